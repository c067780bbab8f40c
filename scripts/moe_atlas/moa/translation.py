"""The translation task: stretches of real English prose and what the rules of the made-up language make of them.

A sentence is a stretch of consecutive words of the demo prose that are all in a closed vocabulary of frequent words,
not across punctuation. Training, validation and test come from different documents, and no sentence of validation or
test is a stretch of a training text. How hard the task is follows from the answers of one who knows the lexicon but not
the rules (`ANSWERS`), which `measures` scores as it scores a model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from sacrebleu.metrics import BLEU

from moe_atlas import tables
from moe_atlas.corpora import demo_texts
from moe_atlas.errors import AtlasError
from moe_atlas.moa.language import PREPOSITIONS, SUFFIXES, Language, kind, make_language
from moe_atlas.moa.settings import Task

SPLITS = ("validation", "test", "test-longer")
# What can be said without the rules. words: stems in the order of the source, for each word the suffix that it takes
# most often. order: order right, suffix of the word. agreement: suffixes right, order of the source.
ANSWERS = ("copy", "words", "order", "agreement")
_BREAK = re.compile(r"[.;:!?,](?:\s|$)|[()\[\]]|--|—")
_WORD = re.compile(r"[A-Za-z]+")
_JOINT = "and"  # between two sentences of a document that make a longer one


@dataclass(frozen=True)
class TaskSettings:
    """vocabulary: words, the most frequent of the training texts. shortest, longest: words of a sentence.

    validation_every: each so manieth training document is for validation. most: sentences of validation and of each
    test, 0 for all; of longer ones (two of a document joined) too.
    """

    vocabulary: int = 300
    shortest: int = 4
    longest: int = 12
    validation_every: int = 12
    most: int = 400
    seed: int = 0


def settings_of(task: Task) -> TaskSettings:
    """Of an objective of the settings: `tokenizer` is the number of words, `length` the longest sentence."""
    options = {key: task.data[key] for key in ("shortest", "validation_every", "most") if key in task.data}
    return TaskSettings(task.tokenizer, longest=task.length, **options)


@dataclass(frozen=True)
class TranslationTask:
    """Sentences of each split as (source words, target tokens), and the language; `usual`: of each word its suffix."""

    language: Language
    sentences: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]
    usual: dict[str, str]

    def answer(self, name: str, source: Sequence[str]) -> list[str]:
        """The answer of one of ANSWERS to a sentence."""
        if name == "copy":
            return list(source)
        suffixes = None if name == "agreement" else self.usual
        return self.language.translate(source, order=name == "order", suffixes=suffixes)

    def answers(self, name: str, split: str) -> list[str]:
        """The answers to all sentences of a split, tokens separated by blanks."""
        return [" ".join(self.answer(name, source)) for source, _ in self.sentences[split]]

    def references(self, split: str) -> list[str]:
        """The right translations of a split, tokens separated by blanks."""
        return [" ".join(target) for _, target in self.sentences[split]]

    def chance(self, split: str) -> dict[str, float]:
        """bleu and exact of the best of ANSWERS, each by itself."""
        found = [scores(self.answers(name, split), self.references(split)) for name in ANSWERS]
        return {metric: max(each[metric] for each in found) for metric in found[0]}


def scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """bleu (sacreBLEU of the corpus, 0 to 100, of tokens as they stand) and exact (share of equal sentences)."""
    return {"bleu": _bleu().corpus_score(answers, [references]).score, "exact": exact(answers, references)}


def exact(answers: list[str], references: list[str]) -> float:
    """Share of answers that are the reference."""
    return sum(answer == reference for answer, reference in zip(answers, references, strict=True)) / len(references)


def signature() -> str:
    """How sacreBLEU was computed."""
    bleu = _bleu()
    bleu.corpus_score(["a"], [["a"]])
    return str(bleu.get_signature())


def _bleu() -> BLEU:
    return BLEU(tokenize="none")


def make_task(chosen: TaskSettings) -> TranslationTask:
    """The sentences and the language of these settings. AtlasError where a split has no sentence."""
    every, texts = chosen.validation_every, {"train": [], "validation": [], "test": demo_texts("prose")}
    for document, text in demo_texts("prose-train"):
        texts["train" if (document + 1) % every else "validation"].append((document, text))
    counts = Counter(word for _, text in texts["train"] for stretch in _stretches(text) for word in stretch if word)
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))[: chosen.vocabulary]
    language, rng = make_language(vocabulary, chosen.seed), np.random.default_rng(chosen.seed)
    runs = {name: list(_runs(part, frozenset(vocabulary))) for name, part in texts.items()}
    lengths = range(chosen.shortest, chosen.longest + 1)
    windows = {window for _, run in runs["train"] for window in _windows(run, lengths)}
    found, seen = {"train": sorted(window for window in windows if window[-1] not in PREPOSITIONS)}, set(windows)
    for name in ("validation", "test"):
        fresh = []
        for document, sentence in _cut(runs[name], lengths, rng):
            if sentence not in seen:
                seen.add(sentence)
                fresh.append((document, sentence))
        found[name] = [sentence for _, sentence in fresh]
    pairs = zip(fresh[::2], fresh[1::2], strict=False)
    found["test-longer"] = [(*one, _JOINT, *two) for (document, one), (other, two) in pairs if document == other]
    for name, sentences in found.items():
        if not sentences:
            raise AtlasError(f"the translation task: no sentence is left for {name}; take a larger vocabulary.")
        if name != "train" and 0 < chosen.most < len(sentences):
            places = sorted(rng.permutation(len(sentences))[: chosen.most])
            found[name] = [sentences[i] for i in places]
    both = {name: [(source, tuple(language.translate(source))) for source in part] for name, part in found.items()}
    return TranslationTask(language, both, _usual_suffixes(language, found["train"], vocabulary))


def _stretches(text: str) -> Iterable[list[str]]:
    """The words between two marks of punctuation, in lower case; "" stands for what is no word."""
    for stretch in _BREAK.split(text):
        yield [word.lower() if _WORD.fullmatch(word) else "" for word in stretch.split()]


def _runs(texts: Iterable[tuple[int, str]], known: frozenset[str]) -> Iterable[tuple[int, tuple[str, ...]]]:
    """(document, longest stretches of words that are all known)."""
    for document, text in texts:
        for stretch in _stretches(text):
            run: list[str] = []
            for word in [*stretch, ""]:
                if word in known:
                    run.append(word)
                elif run:
                    yield document, tuple(run)
                    run = []


def _windows(run: tuple[str, ...], lengths: range) -> Iterable[tuple[str, ...]]:
    for length in lengths:
        for start in range(len(run) - length + 1):
            yield run[start : start + length]


def _cut(runs: Iterable[tuple[int, tuple[str, ...]]], lengths: range, rng: np.random.Generator):
    """Runs cut into pieces of lengths that are drawn evenly, one behind the other; the rest of a run where it is long
    enough. A preposition at the end is taken off: it would have nothing to go behind."""
    for document, run in runs:
        while len(run) >= lengths.start:
            size = int(rng.integers(lengths.start, min(len(run), lengths.stop - 1) + 1))
            piece, run = run[:size], run[size:]
            while piece and piece[-1] in PREPOSITIONS:
                piece = piece[:-1]
            if len(piece) >= lengths.start:
                yield document, piece


def _usual_suffixes(language: Language, sentences: list[tuple[str, ...]], vocabulary: list[str]) -> dict[str, str]:
    """Of each word that takes a suffix the one that it takes most often in these sentences."""
    counts: dict[str, Counter] = {word: Counter() for word in vocabulary if kind(word) in ("determiner", "auxiliary")}
    words = {language.stems[word]: word for word in counts}
    for sentence in sentences:
        target = language.translate(sentence)
        for stem, suffix in zip(target, target[1:], strict=False):
            if stem in words:
                counts[words[stem]][suffix] += 1
    return {word: min(count, key=lambda suffix: (-count[suffix], suffix), default=SUFFIXES[0])
            for word, count in counts.items()}  # fmt: skip


def measures(task: TranslationTask, name: str) -> pl.DataFrame:
    """The table moa_tasks: how large each split is, how often the rules matter, and what ANSWERS score."""
    rows = []
    for split, sentences in task.sentences.items():
        sources, targets = zip(*sentences, strict=True)
        order = [task.language.translate(source, order=False) for source in sources]
        agreeing = [sum(kind(word) in ("determiner", "auxiliary") for word in source) for source in sources]
        unusual = [task.answer("order", source) != list(target) for source, target in sentences]
        values = {
            "sentences": len(sentences),
            "source types": len({word for source in sources for word in source}),
            "target types": len({token for target in targets for token in target}),
            "source words": np.mean([len(source) for source in sources]),
            "target tokens": np.mean([len(target) for target in targets]),
            "share reordered": np.mean([a != list(b) for a, b in zip(order, targets, strict=True)]),
            "agreeing words": np.mean(agreeing),
            "share with agreement": np.mean([count > 0 for count in agreeing]),
            "share with an unusual suffix": np.mean(unusual),
        }
        rows += [(split, measure, None, float(value), "") for measure, value in values.items()]
        if split == "train":
            continue
        for answer in ANSWERS:
            for metric, value in scores(task.answers(answer, split), task.references(split)).items():
                rows.append((split, metric, answer, value, signature() if metric == "bleu" else ""))
    return measured(name, rows)


def measured(task: str, rows: list[tuple]) -> pl.DataFrame:
    """The table moa_tasks of rows (split, measure, answer, value, note)."""
    schema = {name: dtype for name, dtype in tables.declared("moa_tasks").schema.items() if name != "task"}
    frame = pl.DataFrame(rows, schema=schema, orient="row", strict=False).with_columns(task=pl.lit(task))
    return tables.conform("moa_tasks", frame)
