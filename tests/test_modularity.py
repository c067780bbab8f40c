"""The mechanism test on a streamed model beside the fully loaded one, its intervals, and its program."""

import importlib
import sys

import families
import numpy as np
import polars as pl
import pytest
import torch
from test_recomputation import save_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from moe_atlas import tables
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.emoe.ffns import dense_ffns
from moe_atlas.emoe.mask import ExpertMask
from moe_atlas.emoe.mechanism import GATES, Split, SplitSums, expert_mass
from moe_atlas.errors import AtlasError
from moe_atlas.modularity import frames
from moe_atlas.modularity.grid import default_layers, loss_arms, read_grid
from moe_atlas.modularity.masked_loss import Arm, masked_losses
from moe_atlas.modularity.observe import LayerSplits, observe
from moe_atlas.modularity.text import TokenText, thinned
from moe_atlas.stream import LayerStream

LENGTHS = [9, 4, 17, 1, 6, 12, 5]
TEXT = TokenText(families.token_ids(LENGTHS), [0, 0, 1, 1, 2, 3, 4])
GRID = {4: [1, 4]}
MASKS = {
    "avg-k": ("gate", "top"),
    "oracle": ("magnitude", "top"),
    "not-top-k": ("gate", "rest"),
    "bottom-k": ("gate", "bottom"),
}


def save_gpt2(folder) -> None:
    """A small random GPT-2, whose matrices are stored the other way round and have biases."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(n_embd=32, n_inner=48, n_layer=3, n_head=2, vocab_size=96))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.save_pretrained(folder)


@pytest.fixture(scope="module", params=["mistral", "gpt2"])
def model(request, tmp_path_factory):
    """A small model's folder, the model, and the splits of its layers 1 and 2 after one pass, with what was kept."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        save_gpt2(folder)
    else:
        families.save("mistral", folder, num_hidden_layers=3)
    made = LayerSplits(GRID, 2)
    kept = dict(observe(LayerStream(Checkpoint(folder)), TEXT.batches, TEXT.index, [1, 2], made))
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), made, kept


def test_what_is_observed_is_what_the_loaded_model_does(model):
    _, loaded, made, kept = model
    ffns, seen = dense_ffns(loaded), {}
    for layer in (1, 2):
        ffns[layer].last.register_forward_pre_hook(
            lambda _m, a, layer=layer: seen.setdefault(layer, []).append(a[0][0])
        )
    for ids in TEXT.sequences:
        with torch.no_grad():
            loaded(torch.tensor([ids]))
    for layer in (1, 2):
        activations = torch.cat([states[1:] for states in seen[layer]])  # without the first token of each sequence
        expected = np.abs(np.corrcoef(activations.double().numpy().T))
        np.testing.assert_allclose(kept[layer].correlation, expected, atol=1e-4)
        documents = np.repeat(TEXT.documents, [length - 1 for length in LENGTHS])
        for one in kept[layer].sums:
            assert one.tokens.tolist() == [11, 16, 5, 11, 4]
            mass = expert_mass(activations, one.split.labels, 4)
            best = (mass.amax(1) / mass.sum(1)).numpy()
            np.testing.assert_allclose(one.mass[1, "oracle"], np.bincount(documents, best), rtol=1e-4)
            for gate in GATES:
                share = 0 if gate == "not-top-k" else 1
                np.testing.assert_allclose(one.mass[4, gate], share * one.tokens, rtol=1e-12)
            assert made.labels(layer, one.split.rule, 4, one.split.seed) is one.split.labels


def labels_of(made):
    return lambda layer, arm: made.labels(layer, arm.rule, arm.experts, arm.seed)


def test_masked_losses_are_those_of_the_loaded_model_with_masks_on(model):
    folder, loaded, made, _ = model
    arms = [Arm((1, 2), 4, 1, rule, 0, gate) for rule in ("cluster", "random") for gate in MASKS]
    arms += [Arm((2,), 4, 1, "contiguous", 0, "avg-k"), Arm((1,), 4, 1, "cluster", 1, "bottom-k")]
    sums, tokens = masked_losses(LayerStream(Checkpoint(folder)), TEXT.batches, TEXT.index.block, arms, labels_of(made))
    assert tokens.tolist() == [11, 16, 5, 11, 4]
    for place, arm in enumerate([None, *arms]):
        masks = []
        for layer in arm.layers if arm else ():
            score, choose = MASKS[arm.gate]
            labels = made.labels(layer, arm.rule, 4, arm.seed)
            masks.append(ExpertMask(dense_ffns(loaded)[layer], labels, 1, score=score, choose=choose).install())
        expected = np.zeros(5)
        for document, ids in zip(TEXT.documents, TEXT.sequences, strict=True):
            with torch.no_grad():
                logits = loaded(torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(ids[1:], dtype=torch.int64)
            expected[document] += functional.cross_entropy(logits, targets, reduction="sum").item()
        for mask in masks:
            mask.remove()
        np.testing.assert_allclose(sums[place], expected, rtol=1e-5)
    assert len({round(total, 3) for total in sums.sum(1)}) == len(sums)  # each way to mask is another one


def test_all_experts_chosen_lose_nothing(model):
    folder, _, made, _ = model
    arms = [
        Arm((1, 2), 4, 4, rule, 0, gate) for rule in ("cluster", "random") for gate in ("avg-k", "oracle", "random")
    ]
    sums, _ = masked_losses(LayerStream(Checkpoint(folder)), TEXT.batches, TEXT.index.block, arms, labels_of(made))
    assert (sums == sums[0]).all()


def test_the_grid_and_its_arms():
    assert read_grid("16:4,8 32:8") == {16: [4, 8], 32: [8]}
    for wrong in ("", "16", "16:0", "16:17", "16:4 16:8", "a:b"):
        with pytest.raises(AtlasError, match="write N:k,k"):
            read_grid(wrong)
    assert default_layers(4) == [1, 3] and default_layers(3) == [0, 2] and default_layers(1) == [0]
    arms = loss_arms({16: [4, 8]}, [1, 3], 2)
    assert len(set(arms)) == len(arms) == 5 * (5 + 4 + 2 * 2)
    assert not [arm for arm in arms if arm.k == 8 and arm.gate == "not-top-k"]
    assert {arm.layers for arm in arms} == {(1, 3), (1,), (3,)}


def test_a_thinned_text_keeps_a_bit_of_every_part():
    text = TokenText([[1] * 10 for _ in range(20)], [number // 2 for number in range(20)])
    short = thinned(text, 100)
    assert len(short.sequences) == 10 and short.documents == list(range(10))
    assert thinned(text, 1000).sequences == text.sequences


def sums_of(rule: str, seed: int, generator: np.random.Generator, blocks: int = 8, shift: float = 0.0) -> SplitSums:
    """Sums as of 40 tokens a block, with a mean of its own for each block and seed."""
    one = SplitSums(Split(rule, 4, seed, np.arange(8) // 2), [1], blocks)
    one.tokens += 40
    for kept in (one.mass, one.agreement):
        for values in kept.values():
            values += torch.from_numpy(40 * (0.4 + shift + generator.normal(0, 0.02, blocks)))
    one.counts[1] += torch.from_numpy(generator.multinomial(40, [0.4, 0.3, 0.2, 0.1], blocks))
    return one


def several(shift: float, blocks: int = 8) -> list[SplitSums]:
    generator = np.random.default_rng(5)
    ones = [sums_of("cluster", seed, generator, blocks, shift) for seed in range(5)]
    ones += [sums_of("random", seed, generator, blocks) for seed in range(5)]
    return [*ones, sums_of("contiguous", 0, generator, blocks)]


def table(rows) -> pl.DataFrame:
    return frames.mechanism_frame("m", "prose", 1, rows)


def test_means_and_differences_are_those_of_all_tokens_and_seeds():
    sums = several(0.1)
    frame = table(frames.choice_rows(sums, np.random.default_rng(0)))
    values = {
        rule: [float(one.mass[1, "avg-k"].sum() / one.tokens.sum()) for one in sums if one.split.rule == rule]
        for rule in ("cluster", "random", "contiguous")
    }
    for rule, own in values.items():
        row = frame.filter(measure="mass", gate="avg-k", split=rule).row(0, named=True)
        assert row["value"] == pytest.approx(np.mean(own), rel=1e-12)
        assert row["low"] < row["value"] < row["high"] and row["seeds"] == len(own) and row["chance"] == 0.25
        assert row["tokens"] == 320
    for other in ("random", "contiguous"):
        row = frame.filter(measure="mass_difference", gate="avg-k", other=f"{other} split").row(0, named=True)
        assert row["value"] == pytest.approx(np.mean(values["cluster"]) - np.mean(values[other]), rel=1e-9)
        assert 0.05 < row["low"] < row["value"] < row["high"] < 0.15
    assert frame.filter(measure="mass", gate="not-top-k")["chance"].to_list() == [0.75] * 3


def test_no_difference_is_told_where_there_is_none():
    frame = table(frames.choice_rows(several(0.0), np.random.default_rng(0))).filter(measure="mass_difference")
    assert ((frame["low"] < 0) & (frame["high"] > 0)).mean() > 0.7  # 95 % each, and gates share nothing here


def test_intervals_are_the_same_each_time_and_missing_where_there_are_few_documents():
    first, second = (table(frames.choice_rows(several(0.1), np.random.default_rng(7))) for _ in range(2))
    assert first.equals(second)
    few = table(frames.choice_rows(several(0.1, blocks=4), np.random.default_rng(7)))
    assert few["low"].is_null().all() and few["value"].is_not_null().all()


def test_documents_that_differ_widen_the_interval():
    widths = []
    for spread in (0.0, 0.2):
        sums = several(0.0)
        for one in sums:
            one.mass[1, "avg-k"] += 40 * spread * torch.tensor([1.0, -1] * 4)
        row = (
            table(frames.choice_rows(sums, np.random.default_rng(0)))
            .filter(measure="mass", gate="avg-k")
            .row(0, named=True)
        )
        widths.append(row["high"] - row["low"])
    assert widths[1] > 3 * widths[0]


def loads(shares: list[float], seed: int) -> list[SplitSums]:
    generator = np.random.default_rng(seed)
    one = sums_of("cluster", 0, generator)
    one.counts[1] = torch.from_numpy(generator.multinomial(40, shares, 8).astype(float))
    return [one]


def test_corpora_with_other_experts_diverge_and_those_with_the_same_do_not():
    apart = {"a": loads([0.5, 0.5, 0, 0], 1), "b": loads([0, 0, 0.5, 0.5], 2)}
    alike = {"a": loads([0.4, 0.4, 0.1, 0.1], 1), "b": loads([0.4, 0.4, 0.1, 0.1], 2)}
    far, near = (table(frames.domain_rows(one, np.random.default_rng(0))) for one in (apart, alike))
    row = far.filter(measure="js_divergence").row(0, named=True)
    assert row["value"] == pytest.approx(1) and row["p_value"] < 0.01 and row["chance"] < 0.3
    assert (row["corpus"], row["other"]) == ("a", "b")
    assert near.filter(measure="js_divergence")["p_value"].item() > 0.05
    shared = far.filter(measure="shared_experts").row(0, named=True)
    assert shared["value"] == 0 and shared["chance"] == pytest.approx(4 * (2 / 4) * (2 / 4))
    shared = near.filter(measure="shared_experts").row(0, named=True)
    assert shared["value"] == 2 and shared["chance"] == pytest.approx(1)
    entropy = far.filter(measure="selection_entropy")
    assert entropy["value"].to_numpy() == pytest.approx(0.5, abs=0.02) and (entropy["chance"] > 0.98).all()


def test_shares_of_a_corpus_sum_to_one():
    one = loads([0.4, 0.3, 0.2, 0.1], 3)
    frame = frames.selection_frame("m", "prose", 1, frames.selection_rows(one, np.random.default_rng(0)))
    assert frame["share"].sum() == pytest.approx(1) and frame["chance"].unique().to_list() == [0.25]
    counts = one[0].counts[1].sum(0)
    assert frame["share"].to_numpy() == pytest.approx((counts / 320).numpy())
    assert (frame["low"] <= frame["share"]).all() and (frame["share"] <= frame["high"]).all()


def test_intervals_over_five_seeds_hold_the_mean_as_often_as_they_say():
    generator, held = np.random.default_rng(0), 0
    for _ in range(1000):
        row = frames._seeds_row("correlation_ratio", 9 + generator.normal(size=5), np.ones(100))
        held += row["low"] < 9 < row["high"]
    assert 0.93 < held / 1000 < 0.97
    few = frames._seeds_row("correlation_ratio", np.ones(4), np.ones(100))
    assert few["low"] is few["high"] is None and few["value"] == 1


def test_what_no_pair_of_neurons_tells_has_no_p():
    """With one neuron an expert there is no pair within."""
    one = SplitSums(Split("cluster", 8, 0, np.arange(8)), [1], 8)
    rest = [SplitSums(Split(rule, 8, 0, np.arange(8)), [1], 8) for rule in ("random", "contiguous")]
    frame = table(frames.correlation_rows([one, *rest], np.full((8, 8), 0.5), 9, np.random.default_rng(0)))
    within = frame.filter(measure="correlation_within")
    assert within["value"].is_null().all() and within["p_value"].is_null().all()
    assert (frame.filter(measure="correlation_between")["p_value"] == 1).all()


def test_rises_of_the_loss_by_hand():
    arms = [
        Arm((1, 2), 4, 1, rule, seed, gate)
        for rule in ("cluster", "random")
        for seed in (0, 1)
        for gate in ("avg-k", "random")
    ]
    generator = np.random.default_rng(0)
    dense, tokens = generator.uniform(90, 110, 6), np.full(6, 20.0)
    rise = {("cluster", "avg-k"): 1.0, ("cluster", "random"): 4.0, ("random", "avg-k"): 2.0, ("random", "random"): 5.0}
    sums = np.stack([dense, *(dense + rise[arm.rule, arm.gate] + arm.seed for arm in arms)])
    found = list(frames.loss_rows(arms, sums, tokens, np.random.default_rng(1)))
    assert {layer for layer, _ in found} == {None}
    frame = frames.mechanism_frame("m", "prose", None, [row for _, row in found])
    assert frame.filter(measure="loss")["value"].item() == pytest.approx(dense.sum() / 120)
    row = frame.filter(measure="loss_rise", split="cluster", gate="avg-k").row(0, named=True)
    assert row["value"] == pytest.approx(1.5 / 20) and row["chance"] == pytest.approx(4.5 / 20) and row["seeds"] == 2
    for other, value in (("random gate", -3 / 20), ("random split", -1 / 20)):
        row = frame.filter(measure="loss_rise_difference", split="cluster", gate="avg-k", other=other)
        assert row["value"].item() == pytest.approx(value)


def program(monkeypatch, name: str, *arguments: str) -> None:
    """Run one of the scripts in this process, where torch is loaded already."""
    monkeypatch.setattr(sys, "argv", [name, "--model", "m", *arguments])
    importlib.import_module(name).main()


def test_the_program_writes_its_tables_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.save("mistral", tmp_path / "dense", num_hidden_layers=2)
    families.save("mixtral", tmp_path / "experts", num_hidden_layers=2)
    for name in ("dense", "experts"):
        save_tokenizer(tmp_path / name)
        described = ["--source", f"path:{name}", "--directory", name, "--output", f"{name}.json", "--dense-allowed"]
        program(monkeypatch, "describe_checkpoint", *described)
    for name, word in (("prose", "as an open source "), ("code", "def of a class ")):
        texts = [word * (1 + number % 3) for number in range(12)]
        pl.DataFrame({"text": texts, "document": [number // 2 for number in range(12)]}).write_parquet(
            tmp_path / f"{name}.parquet"
        )
    corpora = ["--corpus", "prose", "prose.parquet", "--corpus", "code", "code.parquet"]
    shared = ["--checkpoint", "dense.json", *corpora, "--grid", "4:1,4 8:2", "--seeds", "2", "--layers", "1"]
    names = ("mechanism", "selection", "correlation")
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        written = [part for name in names for part in (f"--{name}", f"{folder}/{name}.parquet")]
        program(monkeypatch, "emoe_mechanism", *shared, *written)
    for name in names:
        first, second = (tmp_path / folder / f"{name}.parquet" for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        frame = tables.read(f"emoe_{name}", first)
        assert not frame.is_empty() and frame["model"].unique().to_list() == ["m"]
    frame = tables.read("emoe_mechanism", tmp_path / "first/mechanism.parquet")
    whole = frame.filter(experts=4, k=4)
    assert (whole.filter(pl.col("measure") == "loss_rise")["value"] == 0).all()
    assert whole.filter(measure="mass", gate="avg-k")["value"].to_numpy() == pytest.approx(1)
    assert (
        frame.filter(measure="js_divergence").height == 9 and frame.filter(measure="loss")["value"].is_not_null().all()
    )

    refused = {
        "has experts already": ["--checkpoint", "experts.json", "--grid", "4:1"],
        "has layers 0 to 1": ["--checkpoint", "dense.json", "--grid", "4:1", "--layers", "2"],
        "write N:k,k": ["--checkpoint", "dense.json", "--grid", "4"],
        "equal size": ["--checkpoint", "dense.json", "--grid", "7:1"],
    }
    for text, arguments in refused.items():
        with pytest.raises(AtlasError, match=text):
            program(monkeypatch, "emoe_mechanism", *corpora, *arguments, *written)
