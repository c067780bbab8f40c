"""Counts of choices, by hand on a tiny text and against loops in Python; planted truths are in test_specialization."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import normal

from moe_atlas import choices
from moe_atlas.choices import Confidence, choice_arrays, random_router
from moe_atlas.text_index import TextIndex

TINY = [[1, 7, 7, 9], [1, 7, 8], [1]]  # the first token of each is left out
TINY_IDS = torch.tensor([[3, 2], [0, 1], [0, 2], [2, 0], [3, 2], [1, -1], [1, 3], [0, 1]])


def tiny(**options):
    return choice_arrays(TINY_IDS, TINY_IDS.flip(0), TextIndex.of(TINY), 4, **options)


def test_counts_of_a_tiny_text_by_hand(monkeypatch):
    monkeypatch.setattr(choices, "FEWEST_TOKENS", 2)
    found = tiny()
    assert found["choice_tokens"].tolist() == [3, 2, 0]
    assert found["choice_used"].tolist() == [0, 1, 4]
    assert found["choice_first"].tolist() == [[2, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert found["choice_any"].tolist() == [[3, 1, 2, 0], [0, 2, 0, 1], [0, 0, 0, 0]]
    assert found["choice_pairs"][0].tolist() == [[3, 1, 2, 0], [1, 1, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]]
    assert found["choice_pairs"][1].tolist() == [[0, 0, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    # 0 1 then 0 2: both the same first; 0 2 then 2 0: a common one; 1 then 1 3: the same first.
    assert found["choice_repeats"].tolist() == [[2, 1, 2], [1, 1, 1], [0, 0, 0]]
    assert found["choice_input_ids"].tolist() == [7]
    assert found["choice_input"].tolist() == [[[2, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 0, 0]]]
    assert found["choice_next_ids"].tolist() == []
    assert found["choice_next"].shape == (3, 0, 4)


def loop_counts(ids, tokens, experts, fewest):
    """The same counts token by token; tokens: (sequence, position, block, id)."""
    first, used, pairs, repeats = Counter(), Counter(), Counter(), Counter()
    by_type, after_type = Counter(), Counter()
    kept = [t for t, (_, position, _, _) in enumerate(tokens) if position > 0]
    followed = [t for t in kept if t + 1 < len(tokens) and tokens[t + 1][0] == tokens[t][0]]
    for t in kept:
        block = tokens[t][2]
        own = [e for e in ids[t] if e >= 0]
        used[len(own)] += 1
        if ids[t][0] >= 0:
            first[block, ids[t][0]] += 1
            by_type[tokens[t][3], block, ids[t][0]] += 1
        for i, j in itertools.product(own, own):
            pairs[block, i, j] += 1
    for t in followed:
        here, after = ([e for e in ids[s] if e >= 0] for s in (t, t + 1))
        repeats[tokens[t][2], 0] += 1
        repeats[tokens[t][2], 1] += ids[t][0] >= 0 and ids[t][0] == ids[t + 1][0]
        repeats[tokens[t][2], 2] += bool(set(here) & set(after))
        if ids[t][0] >= 0:
            after_type[tokens[t + 1][3], tokens[t][2], ids[t][0]] += 1
    types = []
    for ids_counted in ([tokens[t][3] for t in kept], [tokens[t + 1][3] for t in followed]):
        ranked = sorted(Counter(ids_counted).items(), key=lambda item: (-item[1], item[0]))
        types.append([token for token, count in ranked if count >= fewest][: choices.MOST_TYPES])
    return first, used, pairs, repeats, by_type, after_type, types


@st.composite
def texts(draw):
    experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, experts))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    total = sum(lengths)
    token = torch.randint(4, (total,), generator=generator).tolist()
    ids = torch.rand(total, experts, generator=generator).topk(top_k).indices
    ids[torch.rand(total, generator=generator) < 0.2, -1] = -1
    sequences = [[token.pop() for _ in range(length)] for length in lengths]
    return sequences, ids, experts, draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(texts())
def test_counts_are_those_of_a_loop(text):
    sequences, ids, experts, most_blocks = text
    index = TextIndex.of(sequences, max_blocks=most_blocks)
    fewest = choices.FEWEST_TOKENS
    found = choice_arrays(ids, ids.roll(1, 0), index, experts)
    rows = list(zip(*(v.tolist() for v in (index.sequence, index.position, index.block, index.token)), strict=True))
    first, used, pairs, repeats, by_type, after_type, types = loop_counts(ids.tolist(), rows, experts, fewest)
    assert found["choice_used"].tolist() == [used[n] for n in range(ids.shape[1] + 1)]
    assert found["choice_input_ids"].tolist() == types[0] and found["choice_next_ids"].tolist() == types[1]
    for block in range(index.blocks):
        assert found["choice_first"][block].tolist() == [first[block, e] for e in range(experts)]
        wanted = [[pairs[block, i, j] for j in range(experts)] for i in range(experts)]
        assert found["choice_pairs"][block].tolist() == wanted
        assert found["choice_any"][block].tolist() == [wanted[e][e] for e in range(experts)]
        assert found["choice_repeats"][block].tolist() == [repeats[block, c] for c in range(3)]
        for name, counts, kinds in (("input", by_type, types[0]), ("next", after_type, types[1])):
            table = [[counts[kind, block, e] for e in range(experts)] for kind in kinds]
            assert found[f"choice_{name}"][block].tolist() == table
    other = choice_arrays(ids.roll(1, 0), ids, index, experts)
    for name in ("first", "any", "pairs", "repeats", "input", "next"):  # the random router's are counted alike
        assert found[f"choice_random_{name}"].tolist() == other[f"choice_{name}"].sum(0, keepdim=True).tolist()


@settings(max_examples=30, deadline=None)
@given(texts(), st.randoms(use_true_random=False))
def test_other_names_of_the_experts_permute_the_counts(text, random):
    sequences, ids, experts, most_blocks = text
    index = TextIndex.of(sequences, max_blocks=most_blocks)
    order = torch.tensor(random.sample(range(experts), experts))
    renamed = torch.where(ids >= 0, order[ids.clamp_min(0)], -1)
    found, other = (choice_arrays(chosen, chosen, index, experts) for chosen in (ids, renamed))
    for name, array in found.items():
        expected = array
        if not name.endswith(("tokens", "used", "ids", "repeats")):
            expected = torch.zeros_like(array).index_copy(-1, order, array)
        if name.endswith("pairs"):
            expected = torch.zeros_like(array).index_copy(-2, order, expected)
        assert torch.equal(other[name], expected), name


def random_text(sequences, length, experts=8, top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(500, (sequences, length), generator=generator).tolist()
    ids = torch.rand(sequences * length, experts, generator=generator).topk(top_k).indices
    return TextIndex.of(texts), ids


def test_blocks_add_up_and_size_is_bounded_whatever_the_text():
    shapes = []
    for sequences in (64, 640):
        index, ids = random_text(sequences, 300)
        found = choice_arrays(ids, ids, index, 8)
        assert found["choice_tokens"].sum() == sequences * 299 == found["choice_used"].sum()
        whole = choice_arrays(ids, ids, TextIndex.of(index.token.view(sequences, -1).tolist(), max_blocks=1), 8)
        for name in ("first", "any", "pairs", "repeats", "input", "next"):
            assert torch.equal(found[f"choice_{name}"].sum(0), whole[f"choice_{name}"][0]), name
        shapes.append({name: array.shape for name, array in found.items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["choice_input"] == (32, choices.MOST_TYPES, 8)


def test_rows_are_worked_on_in_parts(monkeypatch):
    index, ids = random_text(20, 40)
    whole = choice_arrays(ids, ids, index, 8)
    monkeypatch.setattr(choices, "_ROWS", 7)
    assert all(torch.equal(array, whole[name]) for name, array in choice_arrays(ids, ids, index, 8).items())


@pytest.mark.parametrize(("experts", "blocks"), [(64, 32), (128, 16), (400, 5), (512, 1)])
def test_large_counts_of_many_experts_have_fewer_blocks(experts, blocks):
    index, ids = random_text(40, 30, experts)
    found = choice_arrays(ids, ids, index, experts)
    assert found["choice_any"].shape == (32, experts)
    assert found["choice_pairs"].shape == (blocks, experts, experts)
    assert len(found["choice_input"]) == len(found["choice_next"]) == blocks
    merged = torch.zeros(blocks, experts, dtype=torch.int64)
    merged.index_add_(0, torch.arange(32) * blocks // 32, found["choice_any"])
    assert torch.equal(found["choice_pairs"].diagonal(dim1=1, dim2=2).long(), merged)
    assert (merged.sum(1) > 0).all()


@given(st.integers(0, 32), st.integers(1, 3000))
def test_blocks_kept_are_bounded_and_enough_for_an_interval_or_one(blocks, experts):
    kept = choices.blocks_kept(blocks, experts)
    assert kept <= max(blocks, 1) and (kept == 1 or kept * experts <= choices.MOST_BY_BLOCK or kept == blocks == 0)
    assert kept in (1, blocks) or kept >= choices.FEWEST_BLOCKS


def test_choices_of_another_text_are_refused():
    with pytest.raises(ValueError, match="up to 3 for 8 tokens, 3 experts"):
        choice_arrays(TINY_IDS, TINY_IDS, TextIndex.of(TINY), 3)
    with pytest.raises(ValueError, match="for 8 tokens, 4 experts"):
        choice_arrays(TINY_IDS[:-1], TINY_IDS[:-1], TextIndex.of(TINY), 4)


def test_a_random_router_keeps_the_lengths_of_rows_and_nothing_else():
    weight = normal(16, 400, seed=3) * torch.arange(1, 17)[:, None]
    router = random_router(weight.bfloat16(), seed=5)
    assert router.dtype == torch.bfloat16 and torch.equal(router, random_router(weight.bfloat16(), seed=5))
    router = random_router(weight, seed=5)
    torch.testing.assert_close(router.norm(dim=1), weight.norm(dim=1))
    cosines = torch.nn.functional.normalize(router) @ torch.nn.functional.normalize(weight).T
    assert cosines.abs().max() < 5 / math.sqrt(400)
    assert not torch.equal(router, random_router(weight, seed=6))


@pytest.mark.parametrize("experts", [1, 5])
def test_confidence_is_that_of_a_loop(experts):
    index = TextIndex.of(TINY)
    logits = normal(8, experts, seed=1)
    confidence = Confidence(index, experts, 2)
    for rows in (torch.tensor([5, 0, 1]), torch.tensor([7, 2, 6, 4, 3])):
        confidence.add(logits[rows], rows)
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for row, values in enumerate(logits.tolist()):
        if index.position[row] == 0:
            continue
        total = math.fsum(map(math.exp, values))
        scores = sorted((math.exp(value) / total for value in values), reverse=True)
        entropy = -math.fsum(s * math.log(s) for s in scores) / math.log(experts) if experts > 1 else 0.0
        margin = scores[0] - (scores[1] if experts > 1 else 0.0)
        wanted[:, index.block[row]] += torch.tensor([entropy, margin, math.fsum(scores[:2])], dtype=torch.float64)
    found = confidence.arrays()
    assert list(found) == ["confidence_entropy", "confidence_margin", "confidence_mass"]
    torch.testing.assert_close(torch.stack(list(found.values())), wanted, atol=1e-6, rtol=0)
