"""Checkpoints whose answers are known, written to disk, read back and judged as any other."""

import model_types
import numpy as np
import polars as pl
import pytest
import torch
from claim_tables import BEHAVIOR
from scipy.stats import kendalltau
from workflow_runs import ROOT

from moe_atlas import tables
from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.behavioral.tables import FROM_SUMS
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.claims.judge import TABLES, judge
from moe_atlas.claims.sheet import load_claims
from moe_atlas.claims.verdict import DOES_NOT_HOLD, HOLDS
from moe_atlas.layerwise import each_layer
from moe_atlas.parametric.matching import neuron_matching
from moe_atlas.parametric.similarity import weight_similarity
from moe_atlas.probe import extract

LAYERS, EXPERTS, WIDTH, HIDDEN = 8, 8, 16, 32
SIZES = {"N": EXPERTS, "d": HIDDEN, "m": WIDTH}
CLAIMS = load_claims(ROOT / "config/claims.tsv")
SEQUENCES = model_types.token_ids([9] * 10)


def checkpoint(directory, plant, first=lambda network: None):
    """A Mixtral of random weights, changed by plant(layer number, experts, router weight, layer, generator).

    first: what is done to the whole network before.
    """
    network = model_types.model("mixtral", num_hidden_layers=LAYERS, num_local_experts=EXPERTS, intermediate_size=WIDTH)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        first(network)
        for number, layer in enumerate(decoder_layers(network)):
            plant(number, layer.mlp.experts, layer.mlp.gate.weight, layer, generator)
    network.save_pretrained(directory)
    return Checkpoint(directory)


def tables_of(saved, matching=False):
    """The tables that claims read, and matching where it is asked for, of one checkpoint and the sequences above."""
    frames = {name: [tables.empty(name)] for name in (*TABLES, "matching")}
    for layer, bank, _ in each_layer(saved, None, range(LAYERS)):
        frames["similarity"].append(weight_similarity(bank, model="m", layer=layer))
        if matching:
            frames["matching"].append(neuron_matching(bank, model="m", layer=layer))
    sites, tensors = extract(saved, SEQUENCES, keep_tokens=False)
    for site in sites:
        prefix = f"layer_{site['layer']}.{site['site']}."
        arrays = {name.removeprefix(prefix): a.numpy() for name, a in tensors.items() if name.startswith(prefix)}
        place = {"model": "m", "corpus": "c", "layer": site["layer"], "site": site["site"]}
        for name in BEHAVIOR:
            frame = FROM_SUMS[name](arrays, site["labels"]).with_columns(**{k: pl.lit(v) for k, v in place.items()})
            frames[name].append(tables.conform(name, frame))
    return {name: pl.concat(parts) for name, parts in frames.items()}


def verdicts(frames):
    judged = judge("m", frames, SIZES, CLAIMS, ["c"], 0)
    untried = judged.filter(pl.col("estimate").is_null(), pl.col("claim") != "o13-instruct-routing")
    assert untried["reason"].str.contains("do not vary|is the same in all layers").all(), untried
    return {row["claim"]: row for row in judged.iter_rows(named=True)}


def halves(experts):
    """Views (N, m, d) of the act and the up matrices."""
    return experts.gate_up_proj[:, :WIDTH], experts.gate_up_proj[:, WIDTH:]


def off_diagonal(frame):
    return frame.filter(pl.col("a") != pl.col("b"))


ORDERS = [np.random.default_rng(7 + expert).permutation(WIDTH) for expert in range(EXPERTS)]


def permuted_copies(number, experts, router, layer, generator):
    """Every expert is the first one with its neurons in another order; neuron ORDERS[e][i] of it is neuron i of e."""
    act, up = halves(experts)
    for expert, order in enumerate(ORDERS):
        if expert:
            act[expert], up[expert] = act[0][order], up[0][order]
            experts.down_proj[expert] = experts.down_proj[0][:, order]


def test_permuted_copies_match_wholly_in_the_planted_order_and_answer_alike(tmp_path):
    saved = checkpoint(tmp_path, permuted_copies)
    frames = tables_of(saved, matching=True)
    from_first = frames["matching"].filter(a="0", layer=3)
    assert set(from_first["matrix"]) == {"up", "act", "down", "joint"}
    for row in from_first.iter_rows(named=True):
        wanted = kendalltau(np.arange(WIDTH), ORDERS[int(row["b"])]).statistic
        assert row["cosine_after"] == pytest.approx(1, abs=1e-6) and row["cosine_before"] < 0.9
        assert row["tau"] == pytest.approx(wanted), row
        assert row["cosine_after"] > row["null_after_mean"] + 5 * row["null_after_sd"]
    found = verdicts(frames)
    assert off_diagonal(frames["output_similarity"])["cosine_mean_content"].min() > 1 - 1e-5
    # The neurons are the same, their places are not: outputs alike without alike matrices.
    assert found["o08-outputs-without-weights"]["verdict"] == HOLDS
    assert found["o02-alike-weights"]["verdict"] == DOES_NOT_HOLD


def test_orthogonal_experts_have_no_similarity_in_weights_and_outputs(tmp_path):
    def plant(number, experts, router, layer, generator):
        own, part = HIDDEN // EXPERTS, torch.zeros_like
        act, up = halves(experts)
        for matrix in (act, up, experts.down_proj.transpose(1, 2)):
            kept = part(matrix)
            for expert in range(EXPERTS):
                place = slice(expert * own, (expert + 1) * own)
                kept[expert, :, place] = matrix[expert, :, place]
            matrix.copy_(kept)

    frames = tables_of(checkpoint(tmp_path, plant))
    weights = off_diagonal(frames["similarity"].filter(pl.col("matrix") != "router"))
    assert weights["cosine"].to_list() == [0.0] * len(weights)
    assert off_diagonal(frames["output_similarity"])["cosine_mean_content"].abs().max() == 0.0
    found = verdicts(frames)
    assert (found["o02-alike-weights"]["estimate"], found["o02-alike-weights"]["verdict"]) == (0.0, DOES_NOT_HOLD)
    assert found["o08-outputs-without-weights"]["verdict"] == DOES_NOT_HOLD


def test_routers_that_are_the_mean_act_rows_are_found(tmp_path):
    def plant(number, experts, router, layer, generator):
        router.copy_(halves(experts)[0].mean(1))

    found = verdicts(tables_of(checkpoint(tmp_path, plant)))
    for claim in ("o05a-router-act", "o05b-router-act-sign"):
        assert found[claim]["estimate"] == pytest.approx(1, abs=1e-5) and found[claim]["verdict"] == HOLDS
    assert found["h1-neurons-as-experts"]["verdict"] == HOLDS


def test_routers_that_score_by_the_norm_are_found(tmp_path):
    """One neuron an expert, act and up both its router row w: the norm is z silu(z) of the logit z = w x.

    z is positive on every token: x has a large first component, which attention and experts do not write to.
    """

    def plant(number, experts, router, layer, generator):
        router.copy_(0.1 * torch.randn(router.shape, generator=generator))
        router[:, 0] = 1.0
        layer.post_attention_layernorm.weight.fill_(1.0)
        layer.self_attn.o_proj.weight[0] = 0
        act, up = halves(experts)
        for matrix in (act, up):
            matrix.zero_()
            matrix[:, 0] = router
        directions = torch.randn(EXPERTS, HIDDEN, generator=generator)
        directions[:, 0] = 0
        experts.down_proj.zero_()
        experts.down_proj[:, :, 0] = 0.1 * directions / directions.norm(dim=1, keepdim=True)

    frames = tables_of(
        checkpoint(tmp_path, plant, lambda network: network.get_input_embeddings().weight[:, 0].fill_(30))
    )
    diagonal = frames["documents"].filter(pl.col("measure").is_in(["norm_score_diagonal", "top_norm_top_score"]))
    assert set(diagonal["value"]) == {1.0}
    found = verdicts(frames)
    assert found["o09-largest-norm"]["estimate"] == 1.0 and found["o09-largest-norm"]["verdict"] == HOLDS
    assert found["h2-large-norms"]["estimate"] == pytest.approx(1) and found["h2-large-norms"]["verdict"] == HOLDS


def test_a_last_layer_of_equal_experts_is_found(tmp_path):
    def plant(number, experts, router, layer, generator):
        if number == LAYERS - 1:
            experts.gate_up_proj.copy_(experts.gate_up_proj[:1].expand_as(experts.gate_up_proj).clone())
            experts.down_proj.copy_(experts.down_proj[:1].expand_as(experts.down_proj).clone())

    frames = tables_of(checkpoint(tmp_path, plant))
    last = off_diagonal(frames["output_similarity"].filter(layer=LAYERS - 1))
    assert last["cosine_mean_content"].min() > 1 - 1e-5
    found = verdicts(frames)
    for claim in ("o06b-last-layer-outputs", "h3b-last-layer"):
        assert found[claim]["verdict"] == HOLDS, found[claim]
        assert found[claim]["estimate"] == pytest.approx(1, abs=0.15)


def test_experts_that_part_with_depth_are_found(tmp_path):
    def plant(number, experts, router, layer, generator):
        share = 0.9 - 0.11 * number
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.copy_(share**0.5 * stack[:1] + (1 - share) ** 0.5 * stack)

    found = verdicts(tables_of(checkpoint(tmp_path, plant)))
    for claim in ("o03-weights-by-depth", "o06a-outputs-by-depth", "h3a-diversity"):
        assert found[claim]["estimate"] == pytest.approx(-1, abs=0.1), found[claim]
        assert found[claim]["verdict"] == HOLDS, found[claim]
    assert found["o02-alike-weights"]["verdict"] == HOLDS


def test_one_unlike_expert_is_found(tmp_path):
    def plant(number, experts, router, layer, generator):
        for stack in (experts.gate_up_proj, experts.down_proj):
            alike = 0.7**0.5 * stack[:1] + 0.3**0.5 * stack
            if number == 2:
                alike[5] = stack[5]
            stack.copy_(alike)

    row = verdicts(tables_of(checkpoint(tmp_path, plant)))["o01-unlike-expert"]
    assert row["verdict"] == HOLDS and row["estimate"] > 0.3
