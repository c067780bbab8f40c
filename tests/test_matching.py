"""Neuron matching: against all permutations, against planted ones, and against the arrays of the paper's notebooks."""

import collections
import itertools

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau

from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.layerwise import each_layer
from moe_atlas.parametric.chosen import chosen_layers, chosen_pairs
from moe_atlas.parametric.matching import (
    Entry,
    assign,
    directions,
    kendall_tau,
    match_pair,
    neuron_matching,
    null_matches,
    null_moments,
    tau_null_sd,
)

ORACLE = ROOT / "tests/data/oracle"


def ffn(m: int, d: int, seed: int, down_scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up, act, down = (torch.randn(shape, generator=generator) for shape in ((m, d), (m, d), (d, m)))
    return {"up": up, "act": act, "down": down * down_scale}


def permuted(expert: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    """The same function with its neurons in another order: neuron order[i] of the result is neuron i."""
    back = np.argsort(order)
    return {"up": expert["up"][back], "act": expert["act"][back], "down": expert["down"][:, back]}


def by_matrix(rows: list[dict]) -> dict[str, dict]:
    return {row["matrix"]: row for row in rows}


def flattened(expert: dict, name: str) -> np.ndarray:
    matrix = expert[name].double().numpy()
    return matrix.T if name == "down" else matrix


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def brute_force(a: dict, b: dict, names: list[str]) -> tuple[float, float]:
    """Best sum of cosines over all injections, and the cosine of the reordered matrices, in float64."""
    rows = {name: (flattened(a, name), flattened(b, name)) for name in names}
    unit = {n: [m / np.linalg.norm(m, axis=1, keepdims=True) for m in pair] for n, pair in rows.items()}
    similarity = sum(x @ y.T for x, y in unit.values())
    count, columns = similarity.shape
    best = max(itertools.permutations(range(columns), count), key=lambda p: similarity[np.arange(count), p].sum())
    left = np.concatenate([rows[name][0] for name in names])
    right = np.concatenate([rows[name][1][list(best)] for name in names])
    return similarity[np.arange(count), best].sum(), cosine(left, right)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2), st.integers(2, 7), st.integers(0, 10**6))
def test_the_matching_is_the_best_of_all(m, more, d, seed):
    a, b = ffn(m, d, seed), ffn(m + more, d, seed + 1, down_scale=3.0)
    found = by_matrix(match_pair(Entry(a), Entry(b)))
    for matrix, names in {"up": ["up"], "act": ["act"], "down": ["down"], "joint": ["up", "act", "down"]}.items():
        assert found[matrix]["cosine_after"] == pytest.approx(brute_force(a, b, names)[1], abs=1e-5)
        assert found[matrix]["neurons"] == m
        assert (found[matrix]["tau"] is None) == (found[matrix]["cosine_before"] is None) == (more > 0)
    if not more:
        for name in ("up", "act", "down"):
            assert found[name]["cosine_before"] == pytest.approx(
                cosine(flattened(a, name), flattened(b, name)), abs=1e-6
            )


def test_a_permuted_copy_is_found_and_its_order_with_it():
    order = np.random.default_rng(3).permutation(60).tolist()
    a = ffn(60, 16, 0)
    b = permuted(a, order)
    assert assign(Entry(a).rows["up"] @ Entry(b).rows["up"].T).tolist() == order
    for row in match_pair(Entry(a), Entry(b)):
        assert row["cosine_after"] == pytest.approx(1, abs=1e-6)
        assert row["tau"] == pytest.approx(kendalltau(range(60), order).statistic)
        assert row["cosine_before"] < 0.2 < row["null_after_mean"] < 0.9
    for row in match_pair(Entry(a), Entry(a)):
        assert row["tau"] == 1 and row["cosine_before"] == pytest.approx(1, abs=1e-6)


def test_wider_references_have_their_best_neurons_matched_in_either_direction():
    a = ffn(12, 9, 0)
    wide = {name: torch.cat([part, ffn(12, 9, 5)[name]], dim=1 if name == "down" else 0) for name, part in a.items()}
    for first, second in ((a, wide), (wide, a)):
        for row in match_pair(Entry(first), Entry(second)):
            assert row["cosine_after"] == pytest.approx(1, abs=1e-6) and row["neurons"] == 12
            assert row["tau"] is row["cosine_before"] is row["null_tau_sd"] is None


def test_independent_experts_are_at_the_null_and_orthogonal_ones_far_from_it():
    """The null has the norms of the pair: one expert has a neuron ten times as long as the others."""
    rows = []
    for seed in range(12):
        a, b = ffn(64, 32, 2 * seed), ffn(64, 32, 2 * seed + 1)
        a["up"][0] *= 10
        rows += match_pair(Entry(a), Entry(b))
    frame = pl.DataFrame(rows)
    for matrix in ("up", "act", "down", "joint"):
        excess = frame.filter(pl.col("matrix") == matrix)
        excess = ((excess["cosine_after"] - excess["null_after_mean"]) / excess["null_after_sd"]).to_numpy()
        assert abs(excess.mean()) < 1.5 and np.abs(excess).max() < 6
        assert frame["null_after_mean"].min() > 0.15  # while the cosine before is near 0
    tau = frame["tau"].to_numpy()
    assert np.abs(tau).max() < 4 * tau_null_sd(64)
    halves = torch.eye(32).repeat(2, 1)[:32]
    left = {"up": torch.cat([torch.eye(16), torch.zeros(16, 16)], 1), "act": halves[:16], "down": halves[:, :16]}
    right = {"up": torch.cat([torch.zeros(16, 16), torch.eye(16)], 1), "act": halves[:16], "down": halves[:, :16]}
    found = by_matrix(match_pair(Entry(left), Entry(right)))
    assert found["up"]["cosine_after"] == 0 and found["act"]["cosine_after"] == pytest.approx(1)


def test_the_null_is_that_of_independent_directions():
    """Against matchings of other independent neurons, drawn in float64 with another generator."""
    random = np.random.default_rng(11)
    values = []
    for _ in range(40):
        a, b = random.standard_normal((2, 40, 20))
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        values.append((a * b[assign(torch.tensor(a @ b.T))]).sum() / 40)
    drawn = null_matches(40, 40, 20, 1).mean((1, 2))
    spread = np.std(values, ddof=1)
    assert abs(np.mean(drawn) - np.mean(values)) < 4 * spread * (1 / 40 + 1 / len(drawn)) ** 0.5
    assert 0.5 * spread < np.std(drawn, ddof=1) < 2 * spread


@pytest.mark.parametrize("second, matrices", [(120, 1), (120, 3), (160, 1)])
@pytest.mark.parametrize("spread_neurons, lengths", [(512, 0.7), (40, 0.7), (40, 0.0)])
def test_the_nulls_mean_and_spread_are_those_of_independent_experts(
    monkeypatch, second, matrices, spread_neurons, lengths
):
    """Whole matrices in float64, neurons of very different lengths or of one, the spread drawn at fewer neurons too."""
    monkeypatch.setattr("moe_atlas.parametric.matching.SPREAD_NEURONS", spread_neurons)
    random = np.random.default_rng(5)
    norms = [np.exp(lengths * random.standard_normal((matrices, size))) for size in (120, second)]
    values = []
    for _ in range(80):
        sides = [random.standard_normal((matrices, side.shape[1], 48)) for side in norms]
        sides = [x / np.linalg.norm(x, axis=2, keepdims=True) * n[..., None] for x, n in zip(sides, norms, strict=True)]
        units = [x / n[..., None] for x, n in zip(sides, norms, strict=True)]
        rows, columns = linear_sum_assignment(-np.einsum("pad,pbd->ab", *units))
        values.append(cosine(sides[0][:, rows], sides[1][:, columns]))
    mean, sd = null_moments(*norms, 48)
    spread = np.std(values, ddof=1)
    assert abs(mean - np.mean(values)) < 4 * spread * (1 / 80 + 1 / 32) ** 0.5
    assert 0.6 * spread < sd < 1.6 * spread


def test_equal_neurons_match_whichever_way():
    """Ties: the order is not determined, its cosine is."""
    expert = {name: torch.ones(shape) for name, shape in (("up", (6, 4)), ("act", (6, 4)), ("down", (4, 6)))}
    for row in match_pair(Entry(expert), Entry(expert)):
        assert row["cosine_after"] == pytest.approx(1, abs=1e-6) and -1 <= row["tau"] <= 1


def test_weights_that_are_not_finite_and_references_of_another_width_are_refused_in_a_sentence():
    stack = {name: torch.stack([ffn(6, 4, seed)[name] for seed in range(2)]) for name in ("up", "act", "down")}
    with pytest.raises(AtlasError, match="hidden width is 4 and that of its dense reference is 5"):
        neuron_matching(ExpertBank(**stack), model="m", layer=0, reference=FFN(**ffn(6, 5, 1)))
    stack["act"][1, 2, 3] = torch.nan
    with pytest.raises(AtlasError, match="m, layer 3: act of expert 1 holds values that are not finite"):
        neuron_matching(ExpertBank(**stack), model="m", layer=3)


def test_a_neuron_of_zeros_matches_nothing_and_breaks_nothing():
    a, b = ffn(8, 5, 0), ffn(8, 5, 1)
    a["up"][2] = 0
    b["act"][:] = 0
    found = by_matrix(match_pair(Entry(a), Entry(b)))
    assert found["act"]["cosine_after"] == 0 and np.isfinite(found["up"]["cosine_after"])


@given(st.permutations(range(9)))
def test_tau_is_the_share_of_pairs_in_order(order):
    pairs = list(itertools.combinations(order, 2))
    assert kendall_tau(np.array(order), 9) == pytest.approx(2 * sum(a < b for a, b in pairs) / len(pairs) - 1)


def test_the_spread_of_tau_is_that_of_random_orders():
    values = [kendall_tau(np.random.default_rng(seed).permutation(10), 10) for seed in range(4000)]
    assert np.std(values) == pytest.approx(tau_null_sd(10), rel=0.05)


def test_pairs_and_layers_are_chosen_evenly_and_the_references_first():
    labels = [str(expert) for expert in range(10)] + ["F"]
    assert len(chosen_pairs(labels, 0)) == 55
    few = chosen_pairs(labels, 20)
    assert len(few) == 20 and [pair for pair in few if pair[1] == "F"] == [(str(e), "F") for e in range(10)]
    assert chosen_layers(list(range(32)), "", 4) == [0, 10, 21, 31]
    assert chosen_layers([1, 2, 3], "3,1", 1) == [1, 3] and chosen_layers([1, 2, 3], "", 0) == [1, 2, 3]
    with pytest.raises(AtlasError, match="layer 9 has no experts to match; those that have are 1, 2, 3"):
        chosen_layers([1, 2, 3], "3,1,9", 1)


@pytest.mark.parametrize("experts, extra", [(64, ["SE"]), (64, []), (7, ["F", "SE"]), (1, ["F"]), (2, [])])
@pytest.mark.parametrize("most", [1, 9, 36, 65])
def test_no_expert_and_no_kind_of_pair_is_left_out_for_another(experts, extra, most):
    labels = [str(expert) for expert in range(experts)] + extra
    everything = list(itertools.combinations(labels, 2))
    pairs = chosen_pairs(labels, most)
    assert len(pairs) == len(set(pairs)) == min(most, len(everything)) and set(pairs) <= set(everything)
    assert pairs == [pair for pair in everything if pair in pairs]
    routed = [pair for pair in pairs if pair[1].isdigit()]
    assert len(routed) >= min(most // 2, experts * (experts - 1) // 2)
    if most >= 2 and extra:
        assert len(routed) < len(pairs)
    often = collections.Counter(expert for pair in routed for expert in pair)
    assert max(often.values(), default=0) - min((often[str(e)] for e in range(experts)), default=0) <= 2


def test_the_table_has_each_pair_once_and_the_references_by_their_labels():
    experts = [ffn(6, 4, seed) for seed in range(3)]
    stack = {name: torch.stack([expert[name] for expert in experts]) for name in ("up", "act", "down")}
    bank = ExpertBank(**stack, router=None, shared=FFN(**ffn(12, 4, 9)))
    frame = neuron_matching(bank, model="m", layer=2, reference=FFN(**permuted(experts[1], [5, 4, 3, 2, 1, 0])))
    pairs = frame.select("a", "b").unique().sort("a", "b").rows()
    assert pairs == sorted(itertools.combinations(["0", "1", "2", "F", "SE"], 2), key=lambda p: p)
    reverse = frame.filter(pl.col("a") == "1", pl.col("b") == "F")
    assert reverse["tau"].to_list() == pytest.approx([-1] * 4) and min(reverse["cosine_after"]) > 1 - 1e-6
    assert frame.filter(pl.col("b") == "SE")["tau"].null_count() == len(frame.filter(pl.col("b") == "SE"))


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "grok"])
def test_the_arrays_of_the_papers_notebooks(name):
    """Experiment `reorder`: every permutation is the same, so tau is equal and the cosine to rounding."""
    expected = np.load(ORACLE / "expected" / name / "reorder.npz")
    dense = Checkpoint(ORACLE / "checkpoints/mistral") if name == "mixtral" else None
    layers, compared = expected["layers"].tolist(), 0
    for number, (index, bank, reference) in enumerate(
        each_layer(Checkpoint(ORACLE / "checkpoints" / name), dense, layers)
    ):
        labels = [str(expert) for expert in range(len(bank))]
        labels += ["F"] * (reference is not None) + ["SE"] * (bank.shared is not None)
        assert len(labels) == expected["sim"].shape[-1]
        frame = neuron_matching(bank, model=name, layer=index, reference=reference)
        for row in frame.filter(pl.col("matrix") != "joint").iter_rows(named=True):
            place = number, ("up", "act", "down").index(row["matrix"]), labels.index(row["a"]), labels.index(row["b"])
            assert row["cosine_after"] == pytest.approx(expected["sim"][place], abs=1e-5)
            if row["tau"] is not None:
                assert row["tau"] == pytest.approx(expected["kendall_tau"][place], abs=1e-9)
            entries = [_entry(bank, reference, row[side]) for side in ("a", "b")]
            matched = assign(entries[0].rows[row["matrix"]] @ entries[1].rows[row["matrix"]].T)
            assert np.array_equal(matched, expected["perm"][place][: len(matched)])
            compared += 1
    assert compared == {"mixtral": 432, "deepseek": 1224, "grok": 336}[name]


def _entry(bank: ExpertBank, reference: FFN | None, label: str) -> Entry:
    if label.isdigit():
        return Entry({name: stack[int(label)] for name, stack in bank.matrices.items()})
    found = reference if label == "F" else bank.shared
    return Entry({"up": found.up, "act": found.act, "down": found.down})


@pytest.mark.parametrize("shape", [(300, 300), (180, 260), (260, 180)])
def test_the_assignment_has_the_largest_sum(shape):
    for seed, noise in itertools.product(range(4), (0.05, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(max(shape), 24, generator=generator)
        sides = [base[torch.randperm(len(base), generator=generator)[:size]] for size in shape]
        sides = [side + noise * torch.randn(side.shape, generator=generator) for side in sides]
        similarity = directions(sides[0])[0] @ directions(sides[1])[0].T
        matched = assign(similarity)
        kept = np.flatnonzero(matched >= 0)
        assert len(kept) == min(shape) == len(set(matched[kept].tolist()))
        exact = similarity.double().numpy()
        best = exact[linear_sum_assignment(exact, maximize=True)].sum()
        assert exact[kept, matched[kept]].sum() == pytest.approx(best, abs=1e-6 * min(shape))
