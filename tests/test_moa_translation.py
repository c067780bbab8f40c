"""The made-up language by hand and by an inverse without its code, the task made of it, and its objective."""

import itertools
import math
import re

import numpy as np
import polars as pl
import pytest
import torch

from moe_atlas import architectures, tables
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_models import MoAForTranslation
from moe_atlas.corpora import demo_texts
from moe_atlas.errors import AtlasError
from moe_atlas.moa.decoding import translate
from moe_atlas.moa.language import Language, clauses, make_language
from moe_atlas.moa.ragged import Ragged, batches_by_length
from moe_atlas.moa.registry import objective_of
from moe_atlas.moa.settings import Schedule, Task
from moe_atlas.moa.train import train
from moe_atlas.moa.translation import ANSWERS, TaskSettings, exact, make_task, measures, scores, signature


def split(text: str) -> list[str]:
    return text.split()


WORDS = split("the an all of in to is can be and that value object method returned called python")
GENDERS = {"value": 0, "object": 1, "method": 2, "returned": 0, "called": 1, "python": 2}
PLAIN = Language({word: word.upper() for word in WORDS}, GENDERS)
SCHEDULE = Schedule(5, 50, 2, 0.01, 0.25, 50, 250, 0.1, 0.1)
SETTINGS = TaskSettings(vocabulary=120, longest=8, most=60)


def setting(**changes) -> Task:
    """An objective of the settings, small."""
    values = {"tokenizer": 120, "length": 8, "batch": 16, "validation": 40, "data": {"most": 60}} | changes
    return Task("translation", "demo:translation", seeds=1, selection_seeds=1, rates=(0.01,),
                schedule=SCHEDULE, model={}, kind="translation", **values)  # fmt: skip


@pytest.fixture(scope="module")
def task():
    return make_task(SETTINGS)


@pytest.fixture(scope="module")
def objective():
    return objective_of(setting())


def model_of(objective, **changes) -> MoAForTranslation:
    """A tiny model of an objective, with random weights."""
    architectures.register()
    values = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_encoder_layers": 1}
    values |= {"num_attention_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "norm": "pre"} | changes
    torch.manual_seed(0)
    size = objective.tokenizer.get_vocab_size()
    return MoAForTranslation(MoAConfig(vocab_size=size, objective="translation", **values, **objective.special)).eval()


# The language


@pytest.mark.parametrize(
    ("source", "target"),
    [
        # The example of the module: `of` behind `an`; `is` at the end, a particle in its place; two genders.
        ("the value of an object is returned", "THE -a VALUE AN -i OF OBJECT ye RETURNED IS -i"),
        # Several auxiliaries the last first; the noun before both is `method`.
        ("all method can be called", "ALL -u METHOD ye ye CALLED BE -u CAN -u"),
        # A conjunction opens a clause: nouns of the other one are not seen, and `is` stays in its own.
        ("value that is called and object", "VALUE THAT ye CALLED IS -o AND OBJECT"),
        # A determiner before no noun of its clause; prepositions behind the next word, whatever it is, in order.
        ("method in of the and python", "METHOD THE -o IN OF AND PYTHON"),
        # Behind a particle, behind a conjunction, and at the end, where there is no next word.
        ("to be called of", "ye TO CALLED BE -o OF"),
        ("python of and in", "PYTHON AND OF IN"),
        # The agreement is with the nearest noun: `value`, not `method`; two suffixes of one noun.
        ("method all the value is", "METHOD ALL -a THE -a VALUE ye IS -a"),
    ],
)
def test_sentences_translated_by_hand(source, target):
    assert PLAIN.translate(source.split()) == target.split()


def test_without_order_or_agreement_by_hand():
    source = split("the value of an object is returned")
    usual = {"the": "-u", "an": "-u", "is": "-o"}
    assert PLAIN.translate(source, order=False) == split("THE -a VALUE OF AN -i OBJECT IS -i RETURNED")
    found = PLAIN.translate(source, suffixes=usual)
    assert found == split("THE -u VALUE AN -u OF OBJECT ye RETURNED IS -o")
    both = PLAIN.translate(source, order=False, suffixes=usual)
    assert both == split("THE -u VALUE OF AN -u OBJECT IS -o RETURNED")


def test_a_word_without_a_stem_is_refused():
    with pytest.raises(AtlasError, match="'tuple' is not in the vocabulary"):
        PLAIN.translate(["tuple", "is"])


def test_clauses_begin_at_conjunctions():
    assert clauses(["and", "value", "that", "is", "and"]) == [["and", "value"], ["that", "is"], ["and"]]


def test_stems_are_distinct_and_no_words():
    words = ["same", "name", "base", *map(str, range(4000))]
    language = make_language(words, 3)
    stems = set(language.stems.values())
    assert len(stems) == len(words) and not stems & set(words)
    assert all(re.fullmatch("([bdfgklmnprstvz][aeiou]){2}", stem) for stem in stems)
    assert make_language(words, 3) == language and make_language(words, 4).stems != language.stems
    counts = np.bincount(list(language.genders.values()))
    assert len(counts) == 3 and counts.min() > 1200
    with pytest.raises(AtlasError, match="stems for 4900 words, not for 5000"):
        make_language(list(map(str, range(5000))), 0)


POSTPOSED = split(
    "of to in for by with from on at as into about between after before during under over through without within "
    "against upon via like"
)
OPENING = split("and or but if when that which who because while since where whether so then than unless")


def back(tokens: list[str], stems: dict[str, str]) -> list[str]:
    """The source of a translation: suffixes off, prepositions forward, auxiliaries back to the particles."""
    words = {stem: word for word, stem in stems.items()} | {"ye": "ye"}
    left = [words[token] for token in tokens if not token.startswith("-")]
    forward: list[str] = []
    while left:
        run = list(itertools.takewhile(lambda word: word in POSTPOSED, left[1:])) if left[0] not in POSTPOSED else []
        forward += [*run, left[0]]
        left = left[len(run) + 1 :]
    found: list[str] = []
    starts = [i for i, word in enumerate(forward) if word in OPENING] + [len(forward)]
    for start, end in itertools.pairwise([0, *starts] if starts[0] else starts):
        clause = forward[start:end]
        holes = clause.count("ye")
        body, verbs = clause[: len(clause) - holes], clause[len(clause) - holes :]
        found += [verbs.pop() if word == "ye" else word for word in body]
    return found


@pytest.mark.parametrize("split", ["train", "validation", "test", "test-longer"])
def test_every_translation_leads_back_to_its_source(task, split):
    for source, target in task.sentences[split]:
        assert back(list(target), task.language.stems) == list(source)


# The task


def test_no_test_sentence_is_in_a_training_text(task):
    """As text: a stretch of the training documents in lower case, without another mark between its words."""
    documents = [text.lower() for document, text in demo_texts("prose-train") if (document + 1) % 12]
    texts = " | ".join(" ".join(text.split()) for text in documents)
    for split in ("validation", "test"):
        sentences = [" ".join(source) for source, _ in task.sentences[split]]
        assert len(set(sentences)) == len(sentences)
        assert not [sentence for sentence in sentences if re.search(rf"(^| ){sentence}( |$)", texts)]
    held_out = " | ".join(" ".join(text.lower().split()) for _, text in demo_texts("prose"))
    assert all(" ".join(source) in held_out for source, _ in task.sentences["test"])
    assert all(" ".join(source) in texts for source, _ in task.sentences["train"])


def test_sentences_are_of_the_lengths_that_were_asked_for(task):
    for name in ("train", "validation", "test"):
        lengths = {len(source) for source, _ in task.sentences[name]}
        assert min(lengths) == 4 and max(lengths) <= 8 and len(task.sentences[name]) > 40
    assert all(9 <= len(source) <= 17 and "and" in source for source, _ in task.sentences["test-longer"])
    assert len({word for part in task.sentences.values() for source, _ in part for word in source}) <= 120


def test_the_task_repeats(task):
    again = make_task(SETTINGS)
    assert again.sentences == task.sentences and again.usual == task.usual


def test_a_vocabulary_that_leaves_no_sentence_is_refused():
    with pytest.raises(AtlasError, match="no sentence is left for train; take a larger vocabulary"):
        make_task(TaskSettings(vocabulary=1))


def test_measures_are_those_of_the_sentences(task):
    found = tables.conform("moa_tasks", measures(task, "mine"))
    values = {(split, measure, answer): value for split, measure, answer, value in
              found.select("split", "measure", "answer", "value").iter_rows()}  # fmt: skip
    test = task.sentences["test"]
    assert values["test", "sentences", None] == len(test)
    suffixes = [sum(token.startswith("-") for token in target) for _, target in test]
    assert values["test", "agreeing words", None] == pytest.approx(sum(suffixes) / len(test))
    assert values["test", "share with agreement", None] == sum(count > 0 for count in suffixes) / len(test)
    bare = [[token for token in target if not token.startswith("-")] for _, target in test]
    moved = [
        [task.language.stems[word] for word in source] != stems for (source, _), stems in zip(test, bare, strict=True)
    ]
    assert values["test", "share reordered", None] == sum(moved) / len(test)
    # Who knows the order and of each word its usual suffix is right where no suffix is unusual.
    assert values["test", "exact", "order"] == 1 - values["test", "share with an unusual suffix", None]
    assert values["test", "bleu", "copy"] == 0
    for metric in ("bleu", "exact"):
        assert max(values["test", metric, answer] for answer in ANSWERS) == task.chance("test")[metric]
        assert values["test", metric, "words"] <= min(values["test", metric, name] for name in ("order", "agreement"))
    assert set(found.filter(pl.col("measure") == "bleu")["note"]) == {signature()}


def test_the_usual_suffix_is_the_most_frequent_one(task):
    counts: dict[str, dict[str, int]] = {}
    stems = {stem: word for word, stem in task.language.stems.items()}
    for _, target in task.sentences["train"]:
        for stem, suffix in itertools.pairwise(target):
            if suffix.startswith("-"):
                of_word = counts.setdefault(stems[stem], {})
                of_word[suffix] = of_word.get(suffix, 0) + 1
    assert len(counts) > 8
    for word, of_word in counts.items():
        assert of_word[task.usual[word]] == max(of_word.values())


def test_bleu_by_hand():
    """One sentence of 5 tokens, 4 right in a row: precisions 4/5, 3/4, 2/3, 1/2, as long as the reference."""
    found = scores(["a b c d e"], ["a b c d f"])
    assert found["exact"] == 0 and math.isclose(found["bleu"], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert scores(["a -b", "c"], ["a -b", "d"])["exact"] == exact(["a -b", "c"], ["a -b", "d"]) == 0.5
    assert "tok:none" in signature()


# Sequences and batches


def test_batches_hold_every_sequence_once_and_no_more_tokens():
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    for tokens, sentences in ((0, 7), (64, 0), (64, 3)):
        parts = list(batches_by_length(lengths, np.random.default_rng(1), sentences, tokens))
        assert sorted(np.concatenate(parts)) == list(range(500))
        assert all(len(part) <= (sentences or 500) for part in parts)
        assert not tokens or all(len(part) * lengths[part].max() <= tokens for part in parts)
        spread = [np.ptp(lengths[part]) for part in parts]
        assert np.mean(spread) < 2
        other = list(batches_by_length(lengths, np.random.default_rng(2), sentences, tokens))
        assert [part.tolist() for part in parts] != [part.tolist() for part in other]
    one, two = (np.concatenate(list(batches_by_length(lengths, None, 7))).tolist() for _ in range(2))
    assert one == two and (np.diff(lengths[one]) >= 0).all()
    # As many as fit: of nine sequences of 4 tokens five in 20.
    assert [len(part) for part in batches_by_length(np.full(9, 4), None, 0, 20)] == [5, 4]
    assert [len(part) for part in batches_by_length(np.array([50, 2]), None, 0, 20)] == [1, 1]


def test_a_batch_is_source_end_and_target_end(objective):
    end, pad = objective.special["eos_token_id"], objective.special["pad_token_id"]
    batch = next(objective.batches(0))
    pairs = objective.pairs["train"]
    known = {(tuple(pairs.source[i]), tuple(pairs.target[i])) for i in range(len(pairs.source))}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        source, target = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
        assert source[-1] == target[-1] == end and (ids[~mask.bool()] == pad).all()
        assert (tuple(source[:-1]), tuple(target[:-1])) in known
    assert objective.tokens(batch) == int((batch["labels"] >= 0).sum()) > 16
    assert [len(part["labels"]) for part in objective.validation()] == [16, 16, 8]


def test_an_epoch_has_every_pair_once_and_seeds_differ(objective):
    batches, seen = objective.batches(5), 0
    while seen < len(objective.pairs["train"].source):
        seen += len(next(batches)["labels"])
    assert seen == len(objective.pairs["train"].source)
    first = [next(objective.batches(seed))["labels"] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and first[0].shape != first[2].shape or not torch.equal(first[0], first[2])


def test_the_tokenizer_gives_the_words_back(objective, task):
    for split in ("train", "test"):
        targets = task.references(split)[:50]
        found = objective.pairs[split].target
        assert objective.tokenizer.decode_batch([found[i].tolist() for i in range(len(targets))]) == targets


# Decoding


def greedy_alone(model, source: list[int], longest: int) -> list[int]:
    """Greedy search of one sentence without padding and without cache."""
    ids = [model.config.bos_token_id]
    while len(ids) <= longest:
        logits = model(torch.tensor([source]), decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == model.config.eos_token_id:
            return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize("attention", ["moa", "mha"])
def test_greedy_search_in_batches_is_that_of_each_sentence_alone(objective, attention):
    model = model_of(objective, attention=attention)
    with torch.no_grad():  # random weights repeat one token for ever: let some sentences end
        model.get_input_embeddings().weight[objective.special["eos_token_id"]] *= 3
    sources = objective.pairs["test"].source
    longest = int(sources.lengths.max() + 1) * 2 + 10
    found = translate(model, sources, lambda places: objective._sources(sources, places), batch=len(sources))
    special = set(objective.special.values())
    with torch.no_grad():
        for i in range(12):
            alone = greedy_alone(model, [*sources[i].tolist(), objective.special["eos_token_id"]], longest)
            assert found[i] == [index for index in alone if index not in special]
    assert len({tuple(ids) for ids in found}) > 1


def test_beams_find_what_is_likelier_and_prefer_length_by_the_penalty(objective):
    model = model_of(objective)
    sources = Ragged.of([objective.pairs["test"].source[i] for i in range(10)])

    def found(**options) -> list[list[int]]:
        return translate(model, sources, lambda places: objective._sources(sources, places), 4, **options)

    def likelihood(place: int, ids: list[int]) -> float:
        labels = torch.tensor([[*ids, objective.special["eos_token_id"]]])
        given = objective._sources(sources, np.array([place]))
        with torch.no_grad():
            return -float(model(**given, labels=labels).task_loss) * labels.numel()

    with torch.no_grad():
        model.get_input_embeddings().weight[objective.special["eos_token_id"]] *= 3
    short, long = found(beams=4, length_penalty=0.0), found(beams=4, length_penalty=2.0)
    assert sum(map(len, short)) <= sum(map(len, long))
    greedy = found()
    total = [sum(likelihood(place, ids) for place, ids in enumerate(each)) for each in (short, greedy)]
    assert total[0] >= total[1] - 1e-3


# All of it


def test_scores_are_those_of_the_loss_and_of_the_translations(objective):
    model = model_of(objective)
    found = {score.metric: score for score in objective.scores(model, "test")}
    pairs, total, tokens = objective.pairs["test"], 0.0, 0
    end = objective.special["eos_token_id"]
    for i in range(len(pairs.source)):
        labels = torch.tensor([[*pairs.target[i].tolist(), end]])
        with torch.no_grad():
            output = model(torch.tensor([[*pairs.source[i].tolist(), end]]), labels=labels)
        total += float(output.task_loss.double()) * labels.numel()
        tokens += labels.numel()
    assert found["perplexity"].count == tokens
    assert math.isclose(found["perplexity"].value, math.exp(total / tokens), rel_tol=1e-5)
    answers = objective.translations(model, pairs.source)
    assert {name: found[name].value for name in ("bleu", "exact")} == scores(answers, objective.references["test"])
    assert {name: found[name].chance for name in ("bleu", "exact")} == objective.chances["test"]
    assert found["exact"].count == found["bleu"].count == 60


def test_a_model_learns_to_translate(objective):
    """Enough to know more than how often each token comes."""
    model = model_of(objective, hidden_size=32, head_dim=16, dropout=0.0)
    trained = train(model, objective, 0.01, SCHEDULE, 0)
    assert trained.validation < 0.6 * objective.unlearned
    found = {score.metric: score.value for score in objective.scores(model, "test")}
    assert found["bleu"] > 5
