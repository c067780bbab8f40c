"""What the probe keeps of each layer, against plain loops over Python floats, token by token."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_angular, loop_cosine, loop_rank_counts, normal
from recorded import all_recorders, arrays_of_chunks, compared, made_up, part, with_activation
from scipy import stats

from moe_atlas.accumulate import Sketch, half_octaves, histogram_bins, rank_agreement, rank_ranges
from moe_atlas.behavioral.tables import quantile
from moe_atlas.states import ActivationHistogram, States, edges
from moe_atlas.tables import DOCUMENT_MEASURES
from moe_atlas.text_index import TextIndex

EXPERTS, TOP_K = 5, 2
LABELS = [*"01234", "F", "F_same_input", "SE"]
# Three blocks; sequences of one token, too, so that a block may have position 0 only.
INDEX = TextIndex.of([[7] * length for length in (4, 1, 3, 5, 2)], documents=[0, 1, 2, 2, 0], max_blocks=3)


@pytest.fixture(scope="module")
def chunk():
    return made_up(INDEX, LABELS, EXPERTS, TOP_K)


@pytest.fixture(scope="module")
def arrays(chunk):
    return arrays_of_chunks(all_recorders(INDEX, LABELS, EXPERTS, TOP_K), [chunk])


def groups():
    """(0 content or 1 first, block) of every token, in order."""
    return [
        (int(place == 0), block) for place, block in zip(INDEX.position.tolist(), INDEX.block.tolist(), strict=True)
    ]


def sums(values, empty=math.nan):
    """{(first, block): [sum, count]} of the values that are not nan."""
    found = {(first, block): [0.0, 0] for first in (0, 1) for block in range(INDEX.blocks)}
    for group, value in zip(groups(), values, strict=True):
        if not math.isnan(value):
            found[group][0] += value
            found[group][1] += 1
    return found


def test_chunks_in_any_order_give_what_the_whole_gives(chunk, arrays):
    order = torch.randperm(len(INDEX), generator=torch.Generator().manual_seed(3))
    parts = [part(chunk, rows) for rows in order.split(4)]
    pieces = arrays_of_chunks(all_recorders(INDEX, LABELS, EXPERTS, TOP_K), parts)
    assert pieces.keys() == arrays.keys()
    for name, whole in arrays.items():
        assert whole.dtype == pieces[name].dtype
        torch.testing.assert_close(pieces[name], whole, atol=1e-12, rtol=1e-12, msg=name)


def test_blocks_and_first_tokens_add_up_to_the_totals(arrays):
    upper = np.triu_indices(len(LABELS))
    content = arrays["cosine_sum"] - arrays["cosine_sum_first"]
    torch.testing.assert_close(arrays["cosine_block"].sum(0), content[upper], atol=1e-12, rtol=0)
    tokens = arrays["document_tokens"]
    assert tokens.sum() == arrays["tokens"] and tokens[1].sum() == arrays["tokens_first"] == 5
    assert (
        tokens[0].tolist()
        == arrays["choice_tokens"].tolist()
        == arrays["importance_count"].sum(1).div(2).ceil().tolist()
    )
    trace = arrays["document_sum"][..., DOCUMENT_MEASURES.index("norm_score_diagonal")].sum() * EXPERTS
    assert trace.item() == pytest.approx(arrays["rank_counts"].trace().item(), abs=1e-12)
    largest = arrays["document_sum"][..., DOCUMENT_MEASURES.index("top_norm_top_score")].sum()
    assert largest.item() == pytest.approx(arrays["rank_counts"][-1, -1].item(), abs=1e-12)
    assert (arrays["cosine_histogram"].sum(1) == len(INDEX)).all()
    assert (arrays["activation_histogram"].sum(1) == len(INDEX) * 9).all()


def test_first_tokens_are_counted_apart(chunk, arrays):
    first = [row for row, (is_first, _) in enumerate(groups()) if is_first]
    counts = loop_rank_counts(chunk.logits[first].tolist(), chunk.norms[first].tolist())
    np.testing.assert_allclose(arrays["rank_counts_first"], counts, atol=1e-12)
    load = np.zeros((EXPERTS, TOP_K), int)
    cosine, angular = np.zeros((2, len(LABELS), len(LABELS)))
    for row in first:
        for rank, expert in enumerate(chunk.ids[row].tolist()):
            load[expert, rank] += 1
        for a, b in itertools.product(range(len(LABELS)), repeat=2):
            value = 1.0 if a == b else loop_cosine(*(compared(chunk)[i, row].tolist() for i in (a, b)))
            cosine[a, b] += value
            angular[a, b] += loop_angular(value)
    assert arrays["load_tokens_first"].tolist() == load.tolist()
    np.testing.assert_allclose(arrays["cosine_sum_first"], cosine, atol=1e-12)
    np.testing.assert_allclose(arrays["angular_sum_first"], angular, atol=1e-6)


def loop_measures(chunk, row) -> dict[str, float]:
    """DOCUMENT_MEASURES of one token, by their definitions."""
    outputs = [output[row].double().tolist() for output in compared(chunk)]
    logits, chosen = chunk.logits[row].double().tolist(), [e for e in chunk.ids[row].tolist() if e >= 0]

    def mean(values):
        values = list(values)
        return math.fsum(values) / len(values) if values else math.nan

    def cosines(pairs):
        return [loop_cosine(outputs[a], outputs[b]) for a, b in pairs]

    norms = [math.sqrt(math.fsum(x * x for x in output)) for output in outputs[:EXPERTS]]
    norms = [float(np.float32(norm)) for norm in norms]
    total = math.fsum(math.exp(x) for x in logits)
    scores = sorted((math.exp(x) / total for x in logits), reverse=True)
    pairs = list(itertools.combinations(range(EXPERTS), 2))
    counts = loop_rank_counts([chunk.logits[row].tolist()], [chunk.norms[row].tolist()])
    ranks = stats.rankdata(chunk.norms[row]), stats.rankdata(chunk.logits[row])
    found = {
        "pair_cosine": mean(cosines(pairs)),
        "pair_angular": mean(map(loop_angular, cosines(pairs))),
        "chosen_pair_cosine": mean(cosines(itertools.combinations(chosen, 2))),
        "norm_score_diagonal": sum(counts[i][i] for i in range(EXPERTS)) / EXPERTS,
        "top_norm_top_score": counts[-1][-1],
        "norm_score_spearman": np.corrcoef(*ranks)[0, 1],
        "norm": mean(norms),
        "top1_score": scores[0],
        "top2_score": scores[1],
        "active": mean(abs(a) > np.float32(0.001) for neurons in chunk.activation[:, row] for a in neurons.numpy()),
    }
    for label, name in (("F", "reference"), ("F_same_input", "reference_same_input"), ("SE", "shared")):
        other = LABELS.index(label)
        found[f"{name}_cosine"] = mean(cosines((expert, other) for expert in range(EXPERTS)))
    return found


def test_measures_of_documents_match_loops(chunk, arrays):
    by_token = [loop_measures(chunk, row) for row in range(len(INDEX))]
    assert set(by_token[0]) == set(DOCUMENT_MEASURES)
    assert math.isnan(by_token[-1]["chosen_pair_cosine"])  # it has one chosen expert only
    for number, name in enumerate(DOCUMENT_MEASURES):
        for (first, block), (total, count) in sums([measures[name] for measures in by_token]).items():
            assert arrays["document_count"][first, block, number] == count, name
            assert arrays["document_sum"][first, block, number].item() == pytest.approx(total, abs=1e-6), name


def test_what_a_model_lacks_has_no_measure():
    labels = ["0", "1", "2"]
    chunk = made_up(INDEX, labels, 3, 1)
    with_activation(chunk, None)
    arrays = arrays_of_chunks(all_recorders(INDEX, labels, 3, 1), [chunk])
    counts = dict(zip(DOCUMENT_MEASURES, arrays["document_count"].sum((0, 1)).tolist(), strict=True))
    missing = {name for name, count in counts.items() if count == 0}
    references = {"reference_cosine", "reference_same_input_cosine", "shared_cosine"}
    assert missing == references | {"active", "chosen_pair_cosine"}
    assert "activation_histogram" not in arrays


def test_equal_scores_have_no_rank_correlation():
    ranges = rank_ranges(torch.ones(1, 4), torch.tensor([[1.0, 2, 3, 4]]))
    same, largest, spearman = rank_agreement(*ranges)
    assert same.item() == largest.item() == 0.25 and spearman.isnan().all()
    same, largest, spearman = rank_agreement(
        *rank_ranges(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[4.0, 3, 2, 1]]))
    )
    assert (same.item(), largest.item(), spearman.item()) == (0, 0, -1)


def test_importance_matches_loops(chunk, arrays):
    wanted = np.zeros((4, INDEX.blocks, EXPERTS))
    largest = np.zeros(EXPERTS)
    for row, (first, block) in enumerate(groups()):
        for expert, weight in zip(chunk.ids[row].tolist(), chunk.weights[row].double().tolist(), strict=True):
            if expert < 0:
                continue
            output = chunk.outputs[expert, row].double().tolist()
            norm = math.sqrt(math.fsum(x * x for x in output))
            largest[expert] = max(largest[expert], *map(abs, output))
            if not first:
                wanted[:, block, expert] += (1, weight, norm, weight * norm)
    for name, values in zip(("count", "gate", "norm", "reap"), wanted, strict=True):
        np.testing.assert_allclose(arrays[f"importance_{name}"], values, atol=1e-6)
    np.testing.assert_allclose(arrays["importance_output_max"], largest, rtol=1e-6)
    assert largest.max() > chunk.outputs[:EXPERTS].max() * 0.5  # the negative ones count too


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([50, 200]), st.floats(0.001, 1), st.floats(0.01, 1))
def test_a_quantile_is_off_by_less_than_a_bin(count, seed, bins, q, spread):
    values = (normal(count, 3, seed=seed).double() * spread).clamp(-1, 1)
    values[0, 0] = 1.0
    sketch = Sketch(3, bins)
    for piece in values.split(7):
        sketch.add(piece)
    found = quantile(sketch.counts.numpy(), sketch.range.numpy(), q)
    true = np.quantile(values.numpy(), q, axis=0, method="inverted_cdf")
    assert np.abs(found - true).max() < 2 / bins
    assert (values.amin(0).numpy() <= found).all() and (found <= values.amax(0).numpy()).all()


def test_a_sketch_without_values_has_no_quantile_and_one_of_equal_values_is_exact():
    assert np.isnan(quantile(np.zeros((1, 50), int), np.array([[np.inf, -np.inf]]), 0.5)).all()
    sketch = Sketch(1, 200)
    sketch.add(torch.full((5, 1), 0.123456, dtype=torch.float64))
    assert quantile(sketch.counts.numpy(), sketch.range.numpy(), 0.95) == 0.123456
    assert [histogram_bins(pairs) for pairs in (1, 8192, 8193)] == [200, 200, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_histogram_counts_what_is_above_an_edge(dtype):
    values = normal(EXPERTS, len(INDEX), 40, seed=5) * 10.0 ** normal(EXPERTS, len(INDEX), 40, seed=6).mul(3)
    values[0, :4, 0] = torch.tensor([0.0, -0.0, 0.001, -0.001])
    values[0, 4, :2] = torch.tensor([float("inf"), 1e-30])
    values[1, 0] = edges()[1:41].float()
    activation = values.to(dtype)
    histogram, magnitude = ActivationHistogram(EXPERTS), activation.float().abs()
    for token in range(len(INDEX)):
        for experts in (slice(0, 2), slice(2, EXPERTS)):
            inactive = histogram.add(experts, activation[experts, token : token + 1])
            assert inactive.tolist() == [(magnitude[experts, token] <= 0.001).sum().item()]
    counts = histogram.arrays()["activation_histogram"]
    above = counts.sum(1, keepdim=True) - counts.cumsum(1)
    assert counts.shape == (EXPERTS, 67) and len(edges()) == 66
    for number, edge in enumerate(edges().float()):
        assert above[:, number].tolist() == (magnitude > edge).sum((1, 2)).tolist(), edge
    assert torch.tensor(0.001) in edges().float()
    assert torch.equal(half_octaves(activation) >= 0, magnitude > 0.001)


def test_states_hold_the_experts_and_f_where_it_has_as_many_neurons():
    chunk = made_up(INDEX, LABELS, EXPERTS, TOP_K)
    for width, labels in ((9, [*"01234", "F"]), (7, [*"01234"])):
        states, own = States(len(INDEX), EXPERTS), normal(len(INDEX), width)
        for rows in torch.arange(len(INDEX)).flip(0).split(4):
            states.add(rows, slice(0, 2), chunk.activation[:2, rows], own[rows])
            states.add(rows, slice(2, EXPERTS), chunk.activation[2:, rows])
        assert states.labels == labels and states.kept.shape == (len(INDEX), len(labels), 9)
        assert torch.equal(states.kept[:, :EXPERTS].transpose(0, 1), chunk.activation)
        assert width != 9 or torch.equal(states.kept[:, -1], own)
