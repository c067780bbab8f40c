"""The rule that leads from logits to choices and weights, on routers written out by hand in float64."""

import math

import numpy as np
import pytest
import torch
from loops import normal

from moe_atlas.accumulate import LoadCounts
from moe_atlas.architectures.routers import logits_of
from moe_atlas.behavioral import router_rule as naming
from moe_atlas.router_rule import RouterRule

EXPERTS, TOKENS = 8, 200
BIAS = [0.3, -0.2, 0.1, 0.0, -0.4, 0.25, 0.15, -0.1]
EXPERT_SCALE = [0.5, 1.5, 1.0, 0.75, 1.25, 2.0, 0.9, 1.1]
JITTER = 0.2


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / math.fsum(exponentials) for value in exponentials]


def sigmoid(values):
    return [1 / (1 + math.exp(-value)) for value in values]


def sqrt_softplus(values):
    return [math.sqrt(math.log1p(math.exp(value))) for value in values]


def best(values, k):
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def shares(values):
    return [value / math.fsum(values) for value in values]


def in_groups(values, groups, kept, of_group):
    """Values, with minus infinity outside the `kept` groups of the largest of_group(sorted values of the group)."""
    size = len(values) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    ordered = [sorted((values[i] for i in group), reverse=True) for group in members]
    allowed = {i for group in best([of_group(group) for group in ordered], kept) for i in members[group]}
    return [value if i in allowed else -math.inf for i, value in enumerate(values)]


def add(values, bias):
    return [value + other for value, other in zip(values, bias, strict=True)]


def take(values, ids, factor=1.0):
    return ids, [factor * values[i] for i in ids]


def softmax_then_top_k(x):
    return take(softmax(x), best(x, 3), 0.5)


def softmax_top_k_renormalised(x):
    ids, kept = take(softmax(x), best(x, 3))
    return ids, shares(kept)


def top_k_then_softmax(x):
    ids = best(x, 3)
    return ids, softmax([x[i] for i in ids])


def sigmoid_of_the_largest(x):
    return take(sigmoid(x), best(x, 2))


def deepseek_v3(x):
    biased = in_groups(add(sigmoid(x), BIAS), 4, 2, lambda group: group[0] + group[1])
    ids, kept = take(sigmoid(x), best(biased, 3))
    return ids, [2.5 * share for share in shares(kept)]


def deepseek_v2(x):
    scores = softmax(x)
    return take(scores, best(in_groups(scores, 4, 2, lambda group: group[0]), 3), 16.0)


def sqrt_softplus_with_bias(x):
    scores = sqrt_softplus(x)
    ids, kept = take(scores, best(add(scores, BIAS), 3))
    return ids, [1.5 * share for share in shares(kept)]


def logits_with_bias(x):
    return take(x, best(add(x, BIAS), 3))


def sparsemixer(x):
    """SparseMixer's deterministic case for the first and the second expert, each over what is near to it."""
    first, second = best(x, 2)
    weights = []
    for chosen, left in ((first, x), (second, [v if i != first else -math.inf for i, v in enumerate(x)])):
        top = left[chosen]
        near = [v for v, raw in zip(left, x, strict=True) if (top - raw) / max(abs(raw), top) <= 2 * JITTER]
        weights.append(softmax([top, *near])[0] / (1 - softmax([top, *near])[0]))  # `near` holds `top` once
    return [first, second], weights


def one_scale_an_expert(x):
    ids, kept = top_k_then_softmax(x)
    return ids, [EXPERT_SCALE[i] * value for i, value in zip(ids, kept, strict=True)]


def two_norm(x):
    ids, kept = take(softmax(x), best(x, 3))
    return ids, [value / math.hypot(*kept) for value in kept]


def equal_weights(x):
    ids = best(x, 3)
    return ids, [0.4] * 3


def one_expert(x):
    return best(x, 1), [0.7]


def all_experts(x):
    return take(softmax(x), best(x, EXPERTS))


# rule -> (score, normalised, scale, selection, what the router has)
GROUPS = {"groups": (4, 2)}
RULES = {
    softmax_then_top_k: ("softmax", "all experts", 0.5, "largest logits", {}),
    softmax_top_k_renormalised: ("softmax", "chosen experts", 1, "largest logits", {}),
    top_k_then_softmax: ("softmax", "chosen experts", 1, "largest logits", {}),
    sigmoid_of_the_largest: ("sigmoid", "none", 1, "largest logits", {}),
    deepseek_v3: ("sigmoid", "chosen experts", 2.5, "groups + bias", GROUPS | {"bias": torch.tensor(BIAS)}),
    deepseek_v2: ("softmax", "all experts", 16, "groups", GROUPS),
    sqrt_softplus_with_bias: ("sqrt softplus", "chosen experts", 1.5, "largest score + bias", {"bias": BIAS}),
    logits_with_bias: ("identity", "none", 1, "largest score + bias", {"bias": BIAS}),
    sparsemixer: ("sparsemixer", "none", 1, "largest logits", {"jitter": JITTER}),
    one_scale_an_expert: ("softmax", "chosen experts", sum(EXPERT_SCALE) / EXPERTS, "largest logits", {}),
    two_norm: ("softmax", "other", None, "largest logits", {}),
    equal_weights: ("constant", "none", 0.4, "largest logits", {}),
    one_expert: ("any", "chosen experts", 0.7, "largest logits", {}),
    all_experts: ("softmax", "all experts", 1, "largest logits", {}),
}


def routed(rule, dtype=torch.float64):
    """Logits (T, N) float32, ids and weights of `rule` token by token; the logits are first rounded to `dtype`."""
    logits = 1.5 * normal(TOKENS, EXPERTS).to(dtype).float()
    if rule is logits_with_bias:
        logits = logits.abs() + 0.1
    choices = [rule(row) for row in logits.tolist()]
    ids, weights = (torch.tensor(part) for part in zip(*choices, strict=True))
    return logits, ids, weights.to(torch.float32 if dtype == torch.float64 else dtype)


def recorded(chunks, **router):
    """Arrays of the chunks (logits, ids, weights), as activations.safetensors has them."""
    if "bias" in router:
        router["bias"] = torch.as_tensor(router["bias"])
    found = RouterRule(EXPERTS, **router)
    load = LoadCounts(EXPERTS, chunks[0][1].shape[1])
    for logits, ids, weights in chunks:
        found.add(logits, ids, weights, logits.float())
        load.add(ids.where(ids < EXPERTS, -1), weights)
    tokens = torch.tensor([sum(len(chunk[0]) for chunk in chunks)])
    return {name: array.numpy() for name, array in (found.arrays() | load.arrays() | {"tokens": tokens}).items()}


def named(arrays):
    """The row of the table router_rule."""
    return naming.router_rule(arrays, []).row(0, named=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_written_by_hand_is_named(rule):
    score, normalised, scale, selection, router = RULES[rule]
    row = named(recorded([routed(rule)], **router))
    assert (row["score"], row["normalised"], row["selection"]) == (score, normalised, selection)
    assert row["scale"] == (None if scale is None else pytest.approx(scale, rel=1e-6))
    spread = max(EXPERT_SCALE) / min(EXPERT_SCALE) - 1 if rule is one_scale_an_expert else 0
    assert row["scale_spread"] == pytest.approx(spread, abs=1e-6)
    assert row["weight_error"] < 1e-6 and row["selection_agreement"] == 1 and row["tokens"] == TOKENS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_one_weight_wrong_by_a_hundredth_is_no_rule(rule):
    logits, ids, weights = routed(rule)
    weights[77, 0] *= 1.01
    row = named(recorded([(logits, ids, weights)], **RULES[rule][-1]))
    assert (row["score"], row["normalised"], row["scale"]) == ("other", "other", None)
    assert row["weight_error"] > 0.004
    assert row["selection"] == RULES[rule][3]


@pytest.mark.parametrize("wrong", [1, 10])
def test_the_agreement_is_the_share_of_tokens_chosen_so(wrong):
    logits, ids, weights = routed(top_k_then_softmax)
    smallest = logits.argmin(-1)
    ids[:wrong, 2] = smallest[:wrong]
    row = named(recorded([(logits, ids, weights)]))
    assert row["selection_agreement"] == 1 - wrong / TOKENS
    assert row["selection"] == ("largest logits" if wrong == 1 else "other")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_chunks_and_order_do_not_change_the_result(rule):
    parts, router = routed(rule), RULES[rule][-1]
    whole = recorded([parts], **router)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    shuffled = [part[order] for part in parts]
    chunks = [tuple(part[first : first + 23] for part in shuffled) for first in range(0, TOKENS, 23)]
    chunks.insert(2, tuple(part[:0] for part in parts))
    pieces = recorded(chunks, **router)
    for name in whole.keys() - {"load_weight"}:
        # exp of the same number may differ in its last bit at another place of a vector.
        exact = name in ("rule_selection", "load_tokens", "rule_epsilon")
        np.testing.assert_allclose(pieces[name], whole[name], rtol=0 if exact else 1e-14, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rounded_weights_keep_their_rule(rule):
    score, normalised, scale, selection, router = RULES[rule]
    row = named(recorded([routed(rule, torch.bfloat16)], **router))
    assert (row["score"], row["normalised"], row["selection"]) == (score, normalised, selection)
    assert row["weight_error"] <= 2**-8 * 1.01  # half a unit in the last of eight places
    assert scale is None or row["scale"] == pytest.approx(scale, rel=2**-8)
    assert row["selection_agreement"] == 1


def test_the_tolerance_is_that_of_the_weights_and_the_logits_are_the_routers_own():
    """A router with bfloat16 logits and float32 weights (Mixtral's) has a rule only on its own logits."""
    finer = 1.5 * normal(TOKENS, EXPERTS)
    own = finer.bfloat16()
    kept, ids = own.float().topk(2)
    weights = kept.softmax(-1)
    found = RouterRule(EXPERTS)
    found.add(own, ids, weights, finer)
    load = {"load_tokens": np.full((EXPERTS, 2), 25), "tokens": np.array([TOKENS])}
    row = named({name: array.numpy() for name, array in found.arrays().items()} | load)
    assert (row["score"], row["normalised"]) == ("softmax", "chosen experts") and row["weight_error"] < 1e-6
    assert row["logit_error"] == (own.double() - finer.double()).abs().max().item()
    row = named(recorded([(finer, ids, weights)]))
    assert row["score"] == "other" and row["weight_error"] > 1e-3


def test_empty_slots_and_weights_that_underflow_are_left_out():
    logits, ids, weights = routed(softmax_then_top_k)
    logits[3] = torch.tensor([90.0, 80.0, -40.0, -50.0, -60.0, -70.0, -80.0, -90.0])
    ids[3], weights[3] = torch.arange(3), 0.5 * logits[3].softmax(-1)[:3]
    assert weights[3, 2] == 0
    ids[:3, 2], weights[:3, 2] = EXPERTS, 9.0
    row = named(recorded([(logits, ids, weights)]))
    assert (row["score"], row["normalised"]) == ("softmax", "all experts")
    assert row["scale"] == pytest.approx(0.5) and row["selection_agreement"] == 1
    weights[5, 2] = 0  # of a score that float32 holds
    assert named(recorded([(logits, ids, weights)]))["score"] == "other"


def test_what_is_divided_by_its_sum_is_divided_by_the_used_slots():
    logits, ids, weights = routed(top_k_then_softmax)
    ids[:20, 2], weights[:20, :2] = EXPERTS, logits[:20].topk(2).values.softmax(-1)
    row = named(recorded([(logits, ids, weights)]))
    assert (row["score"], row["normalised"]) == ("softmax", "chosen experts") and row["weight_error"] < 1e-6
    logits, ids, weights = routed(two_norm)
    ids[:3], ids[3:6, 1:] = EXPERTS, EXPERTS
    row = named(recorded([(logits, ids, weights)]))
    assert (row["score"], row["normalised"]) == ("softmax", "other") and row["weight_error"] < 1e-6


def test_an_expert_outside_the_groups_is_not_chosen_by_groups():
    row = named(found := recorded([routed(softmax_then_top_k)], groups=(4, 2)))
    assert row["selection"] == "largest logits"
    inside = [
        set(best(x, 3)) <= {i for i, value in enumerate(in_groups(x, 4, 2, max)) if value > -math.inf}
        for x in routed(softmax_then_top_k)[0].tolist()
    ]
    assert found["rule_selection"][0, 0, 1] == sum(inside) < TOKENS


def test_the_simplest_of_equal_fits_is_named_and_a_better_one_before_it():
    ratio = np.full((2, 5, 1, 2), [np.inf, -np.inf])
    arguments = (np.full(5, -np.inf), np.array([TOKENS]), 3, 0.016)
    ratio[1, :2, 0] = [[0.998, 1.002], [0.999, 1.001]]
    assert naming.weighing(ratio, *arguments).score == "softmax"
    ratio[1, 0, 0] = [0.99, 1.01]
    assert naming.weighing(ratio, *arguments).score == "sigmoid"


def test_a_scale_for_each_expert_needs_several_choices_of_it():
    logits = 3 * torch.eye(EXPERTS)[:4] + 3 * torch.eye(EXPERTS)[4:] + 0.1 * normal(4, EXPERTS)
    ids = logits.topk(2).indices
    assert ids.unique().numel() == EXPERTS
    weights = normal(4, 2, seed=1).abs() + 0.1
    assert named(recorded([(logits, ids, weights)]))["score"] == "other"


def test_the_scale_of_a_range_has_the_smallest_largest_difference():
    low, high = np.array([2.0, 1.0, -1.0, 0.0, 1.0, np.inf]), np.array([3.0, 1.0, 1.0, 1.0, np.inf, -np.inf])
    scale, error = naming.fit(low, high)
    tried = np.linspace(1 / 3, 1 / 2, 100001)
    largest = np.abs(1 - tried[:, None] * [2.0, 3.0]).max(1)
    assert scale[0] == pytest.approx(tried[largest.argmin()], abs=1e-5)
    assert error[0] == pytest.approx(largest.min(), abs=1e-5)
    assert (scale[1], error[1]) == (1, 0) and np.isinf(error[2:]).all()


def test_logits_are_found_among_what_a_router_returns():
    logits = normal(5, 4)
    assert logits_of(logits.bfloat16().view(1, 5, 4), logits).equal(logits.bfloat16())
    assert logits_of((logits.sigmoid(), None, logits), logits).equal(logits)  # Llama 4
    assert logits_of((logits, logits[:, :2], torch.zeros(5, 4, dtype=torch.int64)), logits).equal(logits)
    assert logits_of((logits[:, :2],), logits) is None
