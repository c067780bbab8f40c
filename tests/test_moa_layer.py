"""Blocks of the mixture of attention heads: the equations, what must not change them, and their gradients."""

import copy
import math

import moa_reference as reference
import pytest
import torch
from moa_reference import block, states
from transformers import DynamicCache, JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

from moe_atlas.architectures.moa import MoAAttention, MultiHeadAttention
from moe_atlas.architectures.moa_routing import balance_loss, choose, weigh, z_loss
from moe_atlas.architectures.moa_stack import MoAStack

NORMALIZATIONS = ("none", "detached", "full")


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def scatter(made: torch.nn.Module) -> None:
    """Put random numbers into all parameters."""
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dispatch", ["gather", "sparse"])
@pytest.mark.parametrize("kind", ["causal", "encoder", "cross"])
def test_a_block_computes_the_equations(kind, dispatch, normalization):
    made = block(kind, normalization=normalization, attention_bias=True)
    made.dispatch = dispatch
    hidden, source = states(2, 5, 16), states(2, 7, 16, seed=6) if kind == "cross" else None
    seen = torch.arange(7 if kind == "cross" else 5) < torch.tensor([[4], [7]])
    mask = None if kind == "causal" else seen[:, None, None].expand(-1, 1, 5, -1)
    with torch.no_grad():
        ours = made(hidden, source, mask).output
        close(ours, reference.forward(made, hidden, source, None if kind == "causal" else seen))
        close(made(hidden, source, mask, output_attentions=True).output, ours)


def test_all_experts_and_a_zero_router_are_multi_query_attention_over_e():
    """Written with heads side by side, as multi-query attention is: no routing in it."""
    made = block("encoder", num_experts_per_tok=5)
    torch.nn.init.zeros_(made.router.weight)
    hidden = states(2, 6, 16)
    with torch.no_grad():
        query = torch.einsum("btd,edw->bewt", hidden, made.query.transpose(1, 2))
        scores = torch.einsum("bewt,bsw->bets", query, made.key(hidden)) / math.sqrt(6)
        read = torch.einsum("bets,bsw->betw", scores.softmax(-1), made.value(hidden))
        expected = torch.einsum("betw,edw->btd", read, made.output) / 5
        close(made(hidden).output, expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_experts_and_any_router_are_softly_gated_multi_query_attention(normalization):
    made = block("encoder", num_experts_per_tok=5, normalization=normalization)
    hidden = states(2, 6, 16)
    with torch.no_grad():
        scores = torch.einsum("btd,ewd,bsw->bets", hidden, made.query, made.key(hidden)) / math.sqrt(6)
        heads = torch.einsum("bets,bsw,edw->betd", scores.softmax(-1), made.value(hidden), made.output)
        gates = (hidden @ made.router.weight.T).softmax(-1)
        close(made(hidden).output, torch.einsum("bte,betd->btd", gates, heads))
        assert made(hidden).routing.ids[0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dispatch", ["gather", "sparse"])
def test_the_order_of_experts_does_not_matter(dispatch):
    made, order = block(attention_bias=True), torch.tensor([3, 0, 4, 2, 1])
    other = copy.deepcopy(made)
    made.dispatch = other.dispatch = dispatch
    with torch.no_grad():
        for tensor in (other.router.weight, other.query, other.output, other.query_bias, other.output_bias):
            tensor.copy_(tensor[order].clone())
        hidden = states(2, 6, 16)
        close(other(hidden).output, made(hidden).output)
        assert torch.equal(order[other(hidden).routing.ids], made(hidden).routing.ids)


@pytest.mark.parametrize("make", [MoAAttention, MultiHeadAttention])
def test_a_causal_block_does_not_see_what_comes_later(make):
    made = make(reference.config(attention="moa"), 0, "causal").double()
    scatter(made)
    first, second = states(1, 8, 16), states(1, 8, 16)
    second[:, 5:] += states(1, 3, 16, seed=9)
    with torch.no_grad():
        ours, others = made(first).output, made(second).output
        assert torch.equal(ours[:, :5], others[:, :5]) and not torch.isclose(ours[:, 5:], others[:, 5:]).any(-1).all()


def test_both_dispatches_give_the_same_numbers_and_gradients():
    made = block(attention_bias=True)
    hidden, found = states(3, 9, 16).requires_grad_(), {}
    for dispatch in ("gather", "sparse"):
        made.dispatch = dispatch
        made.zero_grad()
        hidden.grad = None
        output = made(hidden).output
        output.square().sum().backward()
        found[dispatch] = [output.detach(), hidden.grad, *(parameter.grad for parameter in made.parameters())]
    for first, second in zip(found["gather"], found["sparse"], strict=True):
        close(first, second, 1e-10)
    made.dispatch = "other"
    with pytest.raises(ValueError, match="dispatch is 'other'"):
        made(hidden)


def test_an_expert_that_nobody_chooses_is_no_trouble():
    made = block()
    made.dispatch = "sparse"
    made.router.register_forward_hook(lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor(2), -1e9))
    output = made(states(2, 4, 16))
    output.output.sum().backward()
    assert not (output.routing.ids == 2).any() and not made.query.grad[2].any() and made.query.grad[0].any()


def test_slots_of_the_maps_hold_the_experts_of_the_routing():
    made, hidden = block(), states(1, 4, 16)
    with torch.no_grad():
        output = made(hidden, output_attentions=True)
        ids = output.routing.ids
        assert len({tuple(row) for row in ids[0].tolist()}) > 1
        logits = output.routing.logits.gather(-1, ids)
        assert (logits[..., 0] > logits[..., 1]).all()
        for token in range(4):
            for slot in range(2):
                query = made.query[ids[0, token, slot]] @ hidden[0, token]
                scores = made.key(hidden[0, : token + 1]) @ query / math.sqrt(6)
                close(output.maps[0, slot, token, : token + 1], scores.softmax(0))
                assert not output.maps[0, slot, token, token + 1 :].any()


def test_cross_attention_routes_on_the_query_token():
    made, hidden = block("cross"), states(2, 4, 16)
    with torch.no_grad():
        first, second = (made(hidden, states(2, 6, 16, seed=seed)) for seed in (1, 2))
        assert torch.equal(first.routing.logits, second.routing.logits)
        close(first.routing.logits, hidden @ made.router.weight.T)
        assert not torch.isclose(first.output, second.output).any()


# --- gradients of the weights


def jacobian(logits: torch.Tensor, k: int, normalization: str) -> torch.Tensor:
    """d w_i / d l_m as autograd gives it, (k, E)."""
    ids = choose(logits, k)
    return torch.autograd.functional.jacobian(lambda given: weigh(given, ids, normalization), logits)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_of_the_weights_are_the_closed_forms(normalization, k):
    logits = torch.tensor([0.3, -1.1, 0.9, 0.2, 1.7], dtype=torch.float64)
    p, same = logits.softmax(0), torch.eye(5, dtype=torch.float64)
    ids = logits.topk(k).indices.sort().values if k == 5 else logits.topk(k).indices
    w, chosen = p[ids] / p[ids].sum(), torch.isin(torch.arange(5), ids)
    over_all = torch.zeros(5, dtype=torch.float64).index_copy(0, ids, w)
    expected = {
        "none": p[ids, None] * (same[ids] - p),
        "detached": w[:, None] * (same[ids] - p),
        "full": w[:, None] * (same[ids] - over_all) * chosen,
    }[normalization]
    close(jacobian(logits, k, normalization), expected)
    if normalization == "full":
        close(weigh(logits, ids, "full"), weigh(logits, ids, "detached"))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_of_the_weights_by_finite_differences(normalization):
    """Of the function that is differentiated: for "detached" the denominator stays what it was."""
    logits, step = torch.tensor([0.3, -1.1, 0.9, 0.2, 1.7], dtype=torch.float64), 1e-6
    ids = choose(logits, 3)
    total = logits.softmax(0)[ids].sum()

    def value(given: torch.Tensor) -> torch.Tensor:
        if normalization == "detached":
            return given.softmax(0)[ids] / total
        return weigh(given, ids, normalization)

    shifts = step * torch.eye(5, dtype=torch.float64)
    differences = torch.stack([(value(logits + shift) - value(logits - shift)) / (2 * step) for shift in shifts], dim=1)
    close(jacobian(logits, 3, normalization), differences, 1e-8)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_at_one_expert_a_token_only_the_full_form_does_not_train_the_router(normalization):
    made = block(num_experts_per_tok=1, normalization=normalization)
    output = made(states(2, 6, 16))
    output.output.square().sum().backward()
    if normalization != "none":
        assert (output.routing.weights == 1).all()
    assert (made.router.weight.grad.abs().max() > 1e-3) == (normalization != "full")
    assert made.router.weight.grad.any() == (normalization != "full")


def test_a_frozen_router_has_no_gradient():
    made = block(frozen_router=True).requires_grad_(True)
    hidden = states(2, 6, 16).requires_grad_()
    output = made(hidden)
    (output.output.square().sum() + balance_loss(output.routing.logits, output.routing.ids)).backward()
    assert made.router.weight.grad is None and made.query.grad.any()


# --- losses


def test_losses_of_a_case_worked_by_hand():
    """Three tokens and a padding; E = 2, k = 1; logits log 3 and 0, so that p is 3/4 and 1/4 or the reverse."""
    high = math.log(3)
    logits = torch.tensor([[[high, 0], [high, 0], [0, high], [99, -99]]], dtype=torch.float64)
    ids, mask = torch.tensor([[[0], [0], [1], [0]]]), torch.tensor([[1, 1, 1, 0]])
    shares, probabilities = (2 / 3, 1 / 3), ((0.75 + 0.75 + 0.25) / 3, (0.25 + 0.25 + 0.75) / 3)
    expected = 2 * sum(f * p for f, p in zip(shares, probabilities, strict=True))
    assert balance_loss(logits, ids, mask).item() == pytest.approx(expected, abs=1e-12)
    assert z_loss(logits, mask).item() == pytest.approx(math.log(4) ** 2, abs=1e-12)
    kept = logits[:, :3]
    close(balance_loss(kept, ids[:, :3]), balance_loss(logits, ids, mask))
    close(z_loss(kept), z_loss(logits, mask))


def test_the_balance_loss_is_one_for_balanced_choices_and_e_over_k_for_collapsed_ones():
    even = torch.eye(4, dtype=torch.float64)[None] * 5 + torch.eye(4, dtype=torch.float64).roll(1, 1) * 4
    assert balance_loss(even, choose(even, 2)).item() == pytest.approx(1)
    same = torch.tensor([40.0, 40, 0, 0]).expand(1, 7, 4)
    assert balance_loss(same, choose(same, 2)).item() == pytest.approx(2)
    anything = states(1, 7, 4)
    assert balance_loss(anything, choose(anything, 4)).item() == pytest.approx(1)  # nothing is chosen
    uneven = states(3, 50, 4)  # choices follow the probabilities, so that their shares do too
    assert balance_loss(uneven, choose(uneven, 1)).item() > 1


# --- parity, cache, precision


@pytest.mark.parametrize("dispatch", ["gather", "sparse"])
def test_jetmoe_with_one_head_an_expert_is_this_block(dispatch):
    """transformers' own JetMoeAttention with the same weights and rotary positions."""
    theirs = JetMoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_key_value_heads=1, kv_channels=6, intermediate_size=8
    )
    theirs.num_local_experts, theirs.num_experts_per_tok, theirs._attn_implementation = 5, 2, "eager"
    jetmoe, made = JetMoeAttention(theirs, 0).double(), block(normalization="full")
    made.dispatch = dispatch
    with torch.no_grad():
        jetmoe.experts.router.layer.weight.copy_(made.router.weight)
        jetmoe.experts.input_linear.weight.copy_(made.query)
        jetmoe.experts.output_linear.weight.copy_(made.output)
        jetmoe.experts.bias.zero_()
        jetmoe.kv_proj.weight.copy_(torch.cat([made.key.weight, made.value.weight]))
        hidden, places = states(2, 7, 16), torch.arange(7)[None]
        rotation = JetMoeRotaryEmbedding(theirs)(hidden, places)
        later = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        expected, maps, logits = jetmoe(hidden, later, rotation)
        own = MoAStack(reference.config(positions="rotary"))._placed(hidden, places)[1]
        ours = made(hidden, rotation=own, output_attentions=True)
        close(ours.output, expected, 1e-6)
        close(ours.maps, maps, 1e-6)
        close(ours.routing.logits.flatten(0, 1).float(), logits, 1e-6)  # JetMoE rounds them to float32
        assert not torch.allclose(made(hidden).output, expected)  # positions matter


@pytest.mark.parametrize("kind", ["causal", "cross"])
def test_multi_head_attention_is_torchs(kind):
    """Where heads times their width are d, as torch has them."""
    made = MultiHeadAttention(reference.config(num_attention_heads=4, head_dim=4, attention_bias=True), 0, kind)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    made.double()
    scatter(made)
    maps = (made.query, made.key, made.value)
    hidden, source = states(2, 6, 16), states(2, 8, 16, seed=2)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in maps]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in maps]))
        theirs.out_proj.load_state_dict(made.output.state_dict())
        if kind == "causal":
            later = torch.ones(6, 6, dtype=torch.bool).triu(1)
            expected = theirs(hidden, hidden, hidden, attn_mask=later, need_weights=False)[0]
            close(made(hidden).output, expected)
        else:
            close(made(hidden, source).output, theirs(hidden, source, source, need_weights=False)[0])


@pytest.mark.parametrize("steps", [[1] * 6, [3, 1, 2], [6]])
@pytest.mark.parametrize("make", [MoAAttention, MultiHeadAttention])
def test_a_cache_gives_what_one_pass_gives(make, steps):
    made = make(reference.config(), 0, "causal").double()
    scatter(made)
    hidden, cache = states(2, 6, 16), DynamicCache()
    with torch.no_grad():
        parts = [made(part, past_key_values=cache).output for part in hidden.split(steps, dim=1)]
        close(torch.cat(parts, dim=1), made(hidden).output)
    heads = 1 if make is MoAAttention else 3
    assert cache.layers[0].keys.shape == (2, heads, 6, 6)  # routing leaves no trace in it


def test_the_router_is_in_float32_where_the_model_is_in_bfloat16():
    made, hidden = block().bfloat16(), states(2, 6, 16).bfloat16()
    with torch.no_grad():
        output = made(hidden)
        assert output.output.dtype == torch.bfloat16
        assert output.routing.logits.dtype == output.routing.weights.dtype == torch.float32
        close(output.routing.logits, hidden.float() @ made.router.weight.float().T, 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            logits = made.float()(hidden.float()).routing.logits
        close(logits, hidden.float() @ made.router.weight.T, 1e-6)


def test_a_call_leaves_nothing_on_the_module():
    made = block()
    before = {path: dict(vars(module)) for path, module in made.named_modules()}
    made(states(2, 4, 16))
    assert {path: dict(vars(module)) for path, module in made.named_modules()} == before
