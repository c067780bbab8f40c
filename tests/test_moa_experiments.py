"""The MoA experiments: texts, masks, losses by hand, plateaus on planted curves, and runs that repeat."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_atlas import tables
from moe_atlas.corpora import demo_documents
from moe_atlas.errors import AtlasError
from moe_atlas.moa.objectives import NOT_ASKED, Causal, Masked, mean_loss
from moe_atlas.moa.registry import objective_of
from moe_atlas.moa.run import build, chosen_rate, configuration, run_job
from moe_atlas.moa.settings import Job, Schedule, load_settings
from moe_atlas.moa.texts import MASK, Texts, demo_texts
from moe_atlas.moa.train import optimizer_of, train
from moe_atlas.training.data import encode
from moe_atlas.training.tokenizer import BOS_ID, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = load_settings(ROOT / "config" / "moa.yaml")
SCHEDULE = Schedule(2, 4, 2, 0.5, 0.25, 8, 20, 0.0, 0.1)
MODEL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 16}
MODEL |= {"positions": "rotary", "norm": "pre", "activation": "gelu"}
# Small enough that a run takes a second; arms by the attention that they ask for.
SMALL = {"length": 16, "batch": 4, "validation": 8, "seeds": 2, "rates": (0.01, 0.001), "schedule": SCHEDULE}
TINY = {
    "mha": {"heads": 2, "head_dim": 4},
    "moa": {"experts": 4, "k": 2, "head_dim": 4},
    "frozen": {"experts": 4, "k": 2, "head_dim": 4, "router": "frozen", "balance": 0.0, "z": 0.0},
    "all": {"experts": 3, "k": 3, "head_dim": 4},
    "parameters": {"match": "parameters", "of": "moa"},
    "macs": {"match": "macs", "of": "moa"},
}


@pytest.fixture(scope="module")
def settings():
    """The shipped settings with tiny arms, objectives and models, and one study of each objective."""
    moa = next(arm for arm in SETTINGS.arms.values() if arm.attention == "moa")
    mha = next(arm for arm in SETTINGS.arms.values() if arm.attention == "mha")
    arms = {}
    for name, values in TINY.items():
        empty = dict.fromkeys(("experts", "k", "head_dim", "heads", "match", "of"))
        base = moa if "experts" in values else mha
        arms[name] = replace(base, **empty | {"name": name} | values)
    tasks = {name: replace(SETTINGS.tasks[name], **SMALL) for name in ("causal", "masked")}
    template = SETTINGS.studies["language"]
    studies = {
        name: replace(template, name=name, objective=name, arms=tuple(TINY), contrasts=(("moa", "mha"),))
        for name in tasks
    }
    return replace(SETTINGS, model=MODEL, tasks=tasks, arms=arms, studies=studies, keep=())


@pytest.fixture(scope="module")
def texts():
    """Sequences of a small tokenizer over a few training texts."""
    tokenizer = train_tokenizer(["a few words of prose or of code"], 270)
    tokenizer.add_special_tokens([MASK])
    words = [" ".join(text for _, part in demo_documents("prose")[:2] for text in part)]
    encoded = encode(tokenizer, words)
    stream = torch.tensor(encoded[0][: 15 * 60]).view(60, 15)
    sequences = torch.cat([torch.full((60, 1), BOS_ID), stream], dim=1)
    counts = np.bincount(encoded[0], minlength=tokenizer.get_vocab_size()) + 1
    return Texts(tokenizer, {"prose": encoded}, {"prose": 1.0}, sequences[:8], sequences[8:], counts / counts.sum())


@pytest.fixture(scope="module")
def objectives(settings, texts):
    return {name: kind(settings.tasks[name], texts) for name, kind in (("causal", Causal), ("masked", Masked))}


# Texts and masks


def test_no_document_is_in_two_sets():
    """The shipped task: what is looked at and tested is in no training text; the shares of the mix are kept."""
    task = replace(SETTINGS.tasks["causal"], validation=40)
    found = demo_texts(task)
    assert found.validation.shape == (40, task.length) and found.test.shape[1] == task.length
    trained = {
        tuple(ids[i : i + 20]) for texts in found.encoded.values() for ids in texts for i in range(len(ids) - 19)
    }
    for sequences in (found.validation, found.test[:100]):
        pieces = [tuple(row[i : i + 20].tolist()) for row in sequences for i in range(1, task.length - 20, 20)]
        assert sum(piece in trained for piece in pieces) < 0.05 * len(pieces)  # formulas and signatures repeat
    assert math.isclose(found.frequencies.sum(), 1)
    documents = [len(demo_documents(f"{domain}-train")) for domain in task.data["mix"]]
    assert all(-(-count // 8) >= 4 for count in documents)


def test_a_mix_of_unknown_texts_is_refused():
    for mix in ({"poems": 1.0}, {"prose": 0.5}):
        with pytest.raises(AtlasError, match="objectives, causal, mix: .* must share 1 among prose, code"):
            demo_texts(replace(SETTINGS.tasks["causal"], data={"mix": mix}))
    with pytest.raises(AtlasError, match="causal, source: poems:all is of no known kind; write one of demo:"):
        objective_of(replace(SETTINGS.tasks["causal"], source="poems:all"))


def test_masks_hide_what_they_should(objectives):
    """Of each sequence the share of its ordinary tokens; 80, 10 and 10 % of those; special tokens never."""
    masked, rng = objectives["masked"], np.random.default_rng(3)
    ids = torch.from_numpy(rng.choice(masked.ordinary, (2000, 33)))
    ids[:, 0], ids[:, 7], ids[5, 9] = BOS_ID, 2, 0
    batch = masked.labelled(ids, rng)
    chosen = batch["labels"] != NOT_ASKED
    ordinary = (ids != BOS_ID) & (ids != 2) & (ids != 0)
    assert not (chosen & ~ordinary).any()
    assert torch.equal(chosen.sum(1), torch.round(masked.share * ordinary.sum(1).double()).long())
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    seen = batch["input_ids"][chosen]
    count, hidden, left = len(seen), int((seen == masked.mask_id).sum()), int((seen == ids[chosen]).sum())
    for found, share in ((hidden, 0.8), (left, 0.1), (count - hidden - left, 0.1)):
        assert abs(found / count - share) < 4 * math.sqrt(share * (1 - share) / count) + 0.1 / len(masked.ordinary)
    assert set(seen[(seen != masked.mask_id)].tolist()) <= set(masked.ordinary.tolist())
    # Every place is chosen as often as any other.
    places = chosen[:, [*range(1, 7), *range(8, 33)]].double().mean(0)
    assert (places - places.mean()).abs().max() < 5 * math.sqrt(masked.share / len(ids))


def test_training_masks_differ_and_evaluation_masks_stay(settings, texts, objectives):
    masked, again = objectives["masked"], Masked(settings.tasks["masked"], texts)
    for name in ("validation", "test"):
        for one, other in zip(masked.sets[name], again.sets[name], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = masked.batches(0), masked.batches(0)
    batches = [next(first) for _ in range(4)]
    assert all(torch.equal(batch["labels"], next(second)["labels"]) for batch in batches)
    assert not torch.equal(batches[0]["labels"], next(masked.batches(1))["labels"])
    assert not torch.equal(batches[0]["labels"] != NOT_ASKED, batches[1]["labels"] != NOT_ASKED)


# Losses


class Planted(torch.nn.Module):
    """A MoA model whose losses are taken from its logits by hand."""

    def __init__(self, model, causal: bool):
        super().__init__()
        self.model, self.causal = model, causal

    def nats(self, batches) -> list[float]:
        found = []
        for batch in batches:
            log_p = self.model(input_ids=batch["input_ids"]).logits.detach().double().log_softmax(-1)
            for row in range(len(log_p)):
                for place, label in enumerate(batch["labels"][row].tolist()):
                    if label != NOT_ASKED:
                        found.append(-float(log_p[row, place - self.causal, label]))
        return found


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_perplexity_is_that_of_the_tokens_that_are_asked_for(settings, objectives, name):
    """Token by token from the logits; a causal model is asked for all but the first token of a sequence."""
    objective = objectives[name]
    model = build(configuration(settings, objective, settings.tasks[name], "moa"), 0).eval()
    nats = Planted(model, name == "causal").nats(objective.sets["test"])
    (score,) = objective.scores(model, "test")
    assert score.count == len(nats) and math.isclose(score.value, math.exp(sum(nats) / len(nats)), rel_tol=1e-5)
    labels = torch.cat([batch["labels"].flatten() for batch in objective.sets["test"]])
    labels = labels[labels != NOT_ASKED]
    assert len(labels) == score.count
    frequencies = [objective.texts.frequencies[label] for label in labels.tolist()]
    by_hand = math.exp(-sum(math.log(share) for share in frequencies) / len(labels))
    assert score.metric == "perplexity" and math.isclose(score.chance, by_hand, rel_tol=1e-9)
    if name == "causal":
        assert score.count == 15 * len(objective.texts.test)


def test_a_mean_over_batches_is_one_over_tokens(objectives, settings):
    """Batches of different numbers of tokens: the mean weighs each token alike, in evaluation mode."""
    objective = objectives["masked"]
    model = build(configuration(settings, objective, settings.tasks["masked"], "mha"), 0).train()
    batches = [dict(batch) for batch in objective.sets["validation"]]
    batches[0]["labels"] = batches[0]["labels"].clone()
    batches[0]["labels"][1:] = NOT_ASKED
    nats = Planted(model, False).nats(batches)
    loss, tokens = mean_loss(model, batches)
    assert tokens == len(nats) and math.isclose(loss, sum(nats) / len(nats), rel_tol=1e-5) and model.training


# Runs


@pytest.mark.parametrize("name", ["causal", "masked"])
@pytest.mark.parametrize("arm", ["mha", "moa", "frozen"])
def test_a_run_learns_and_moves_what_it_should(settings, objectives, name, arm):
    objective, task = objectives[name], settings.tasks[name]
    model = build(configuration(settings, objective, task, arm), 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start, _ = mean_loss(model, objective.validation())
    schedule = replace(SCHEDULE, least=20, most=60)
    found = train(model, objective, 0.01, schedule, 0)
    assert found.validation < start - 0.2 and found.tokens == found.steps * 4 * 16 and found.seconds > 0
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    routers = {key for key in before if "router" in key}
    assert moved == set(before) - (routers if arm == "frozen" else set()) and bool(routers) == (arm != "mha")
    steps = [step for step, split, _ in found.curve if split == "validation"]
    assert steps[-1] == found.steps and found.curve[-1][2] == found.validation
    assert len(found.curve) == 2 * len(steps) and math.isclose(
        mean_loss(model, objective.validation())[0], found.validation
    )


def test_accumulated_batches_make_the_step_of_one(settings, objectives):
    """Two batches of a step: the gradient is the mean of theirs, and as many tokens are counted."""
    objective, task = objectives["causal"], settings.tasks["causal"]
    config = configuration(settings, objective, task, "mha")
    schedule = replace(SCHEDULE, warmup=1, evaluate=1, least=1, most=1, window=1, decay=0.0, accumulate=2, clip=0.0)
    accumulated, by_hand = build(config, 0), build(config, 0).train()
    assert train(accumulated, objective, 0.01, schedule, 0).tokens == 2 * 4 * 16
    optimizer, batches = optimizer_of(by_hand, 0.01, schedule), objective.batches(0)
    (sum(by_hand(**next(batches)).loss for _ in range(2)) / 2).backward()
    optimizer.step()
    for one, other in zip(accumulated.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def job(settings, objectives, tmp_path_factory):
    """One job, run twice."""
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("job") / str(number)
        found.append((run_job(settings, Job("causal", "causal", "moa"), objectives["causal"], folder), folder))
    return found


def test_a_run_is_the_same_bytes_twice(job):
    (first, one), (second, other) = job
    for name in ("moa_runs", "moa_curves"):
        assert first[name].equals(second[name]) and len(first[name])
    names = sorted(path.name for path in one.iterdir())
    assert {"config.json", "done.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_rates_are_chosen_on_validation_and_only_theirs_is_tested(job):
    runs, curves = job[0][0]["moa_runs"], job[0][0]["moa_curves"]
    tables.conform("moa_runs", runs)
    looked = runs.filter(test="validation", seed=0).sort("value")
    assert looked["chosen"].to_list() == [True, False] and set(looked["metric"]) == {"perplexity"}
    assert runs.filter(test="test")["learning_rate"].unique().to_list() == [looked["learning_rate"][0]]
    assert sorted(runs.filter(test="test")["seed"]) == [0, 1] and runs.filter(test="test")["chosen"].all()
    ends = (
        curves.filter(split="validation").group_by("seed", "learning_rate").agg(pl.col("loss").sort_by("step").last())
    )
    joined = runs.filter(test="validation").join(ends, on=["seed", "learning_rate"])
    np.testing.assert_allclose(joined["value"], joined["loss"].exp())
    assert chosen_rate({0.1: [2.0, 4.0], 0.2: [2.5, 2.5], 0.3: [math.nan, 0.0]}) == 0.2
    with pytest.raises(AtlasError, match="no learning rate of this arm gives a finite loss"):
        chosen_rate({0.1: [math.nan], 0.2: [math.inf]})


def test_the_kept_model_is_the_one_that_was_tested(job, objectives):
    """Loaded by transformers, it has the perplexity of the run that done.json names, and its tokenizer."""
    tables_of_job, folder = job[0]
    done = json.loads((folder / "done.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = tables_of_job["moa_runs"].filter(test="test", seed=done["seed"], learning_rate=done["learning_rate"])
    (score,) = objectives["causal"].scores(model.eval(), "test")
    assert score.value == row["value"].item() and done["steps"] == row["steps"].item()
    tokenizer = objectives["causal"].tokenizer
    assert AutoTokenizer.from_pretrained(folder)("a few words")["input_ids"] == tokenizer.encode("a few words").ids


def test_matched_arms_match_and_experts_that_are_all_taken_are_marked(settings, objectives, tmp_path):
    objective, task = objectives["causal"], settings.tasks["causal"]
    rows = {}
    for arm in ("moa", "parameters", "macs", "all"):
        one_seed = replace(settings, tasks={"causal": replace(task, seeds=1, rates=(0.01,))})
        runs = run_job(one_seed, Job("causal", "causal", arm), objective, tmp_path / arm)["moa_runs"]
        rows[arm] = runs.row(0, named=True)
        model = build(configuration(settings, objective, task, arm), 0)
        assert rows[arm]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    moa = rows["moa"]
    assert abs(rows["parameters"]["attention_parameters"] / moa["attention_parameters"] - 1) < 0.1
    assert abs(rows["macs"]["macs"] / moa["macs"] - 1) < 0.1
    assert [rows[arm]["selects"] for arm in ("moa", "all", "macs")] == [True, False, None]
    assert rows["macs"]["router"] == "none" and rows["macs"]["experts"] is rows["macs"]["balance"] is None
