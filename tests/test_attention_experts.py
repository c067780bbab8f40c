"""One view of attention experts: maps, slots, weights and circuits are those of the models' own code."""

import families
import heads_models
import pytest
import torch

from moe_atlas.architectures.attention_experts import routed_experts
from moe_atlas.errors import AtlasError


def jetmoe(**changes: object) -> torch.nn.Module:
    model = families.model("jetmoe", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **changes)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.tensor(families.token_ids([length] * rows))


def calls_of(experts, run) -> list:
    """What the watcher of one set of experts sees while `run()` runs."""
    seen = []
    with experts.watched(seen.append):
        run()
    return seen


def test_the_slots_of_jetmoe_hold_the_experts_that_the_ids_name():
    """transformers' eager attention: head h of a token is of expert ids[h // H]."""
    model, ids = jetmoe(), tokens(2, 9)
    attentions = model(ids, output_attentions=True).attentions
    for layer, attention in zip(model.model.layers, attentions, strict=True):
        experts = routed_experts(layer)[0]
        (call,) = calls_of(experts, lambda: model(ids))
        maps, visible = call.maps()
        assert experts.heads == 2 and maps.shape == (2, 4, 2, 9, 9) and attention.shape == (2, 4, 9, 9)
        assert torch.equal(visible[0], torch.ones(9, 9, dtype=torch.bool).tril())
        for b in range(2):
            for t in range(9):
                for h in range(4):
                    mine = maps[b, call.ids[b, t, h // 2], h % 2, t]
                    torch.testing.assert_close(mine, attention[b, h, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off", [None, 1])
def test_jetmoe_is_the_sum_of_what_its_experts_read_and_write(off):
    """Ids, weights, maps and circuits put together by hand give the block's own output, without an expert too."""
    model = jetmoe()
    experts = routed_experts(model.model.layers[1])[0]
    block, hidden = model.model.layers[1].self_attention, torch.randn(1, 6, 32)
    position = torch.arange(6)[None]
    arguments = {"position_embeddings": model.model.rotary_emb(hidden, position)}
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    run = lambda: outputs.append(block(hidden, attention_mask=mask, **arguments)[0])  # noqa: E731
    outputs: list[torch.Tensor] = []
    if off is None:
        (call,) = calls_of(experts, run)
        logits = hidden @ block.experts.router.layer.weight.T
    else:
        with experts.without(off):
            (call,) = calls_of(experts, run)
        logits = hidden @ block.experts.router.layer.weight.T
        logits[..., off] = -torch.inf
        assert (call.ids != off).all()
    values, ids = logits.topk(2)
    assert torch.equal(call.ids, ids)
    torch.testing.assert_close(call.weights, values.softmax(-1))
    mine = heads_models.mixture(call, experts.circuits()) + block.experts.bias.double()
    torch.testing.assert_close(outputs[0].double(), mine, rtol=1e-4, atol=1e-5)


def test_the_query_circuit_of_jetmoe_gives_its_scores_without_positions():
    model = jetmoe()
    experts, block = routed_experts(model.model.layers[0])[0], model.model.layers[0].self_attention
    hidden = torch.randn(1, 5, 32)
    still = torch.ones(1, 5, block.head_dim), torch.zeros(1, 5, block.head_dim)
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    (call,) = calls_of(experts, lambda: block(hidden, attention_mask=mask, position_embeddings=still))
    own, (maps, _) = experts.circuits(), call.maps()
    for e in range(4):
        for h in range(2):
            circuit = own.query[e, h].T @ own.key[h]
            scores = hidden[0] @ circuit @ hidden[0].T / block.head_dim**0.5
            torch.testing.assert_close(maps[0, e, h], (scores + mask[0, 0]).softmax(-1), rtol=1e-4, atol=1e-5)


def test_ffn_experts_of_jetmoe_are_seen_beside_attention_experts():
    model, ids = jetmoe(), tokens(1, 7)
    attention, ffn = routed_experts(model.model.layers[0], 0)
    assert (attention.site, ffn.site, ffn.kind, ffn.heads) == ("attention", "ffn", "ffn", 0)
    (call,) = calls_of(ffn, lambda: model(ids))
    gating = model.model.layers[0].mlp.router
    _, rows, gates, sizes, logits = gating(call.inputs.flatten(0, 1))
    torch.testing.assert_close(call.logits[0], logits)
    mine = torch.zeros(7, 4).scatter(1, call.ids[0], call.weights[0])
    own = torch.zeros(7, 4)
    own[rows, torch.arange(4).repeat_interleave(torch.tensor(sizes))] = gates
    torch.testing.assert_close(mine, own)
    assert call.maps is None
    with pytest.raises(AtlasError, match="no query and key circuits"):
        ffn.circuits()


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("objective", ["causal", "masked", "translation"])
def test_maps_of_moa_are_those_of_its_blocks_and_padding_is_not_seen(objective, positions):
    model = heads_models.moa(objective, positions=positions)
    ids = torch.randint(3, heads_models.VOCABULARY, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "output_attentions": True, "use_cache": False}
    if objective == "translation":
        arguments["decoder_input_ids"] = torch.randint(3, heads_models.VOCABULARY, (2, 6))
    output = model(**arguments)
    found = {"causal": output.attentions, "encoder": output.attentions}
    if objective == "translation":
        found = {"encoder": output.encoder_attentions, "decoder": output.decoder_attentions}
        found["cross"] = output.cross_attentions
    experts = routed_experts(model)
    kinds = {"causal": {"causal"}, "masked": {"encoder"}, "translation": {"encoder", "decoder", "cross"}}
    assert {one.kind for one in experts} == kinds[objective]
    for one in experts:
        (call,) = calls_of(one, lambda: model(**arguments))
        maps, visible = call.maps()
        own = found[one.kind][one.layer]
        for b in range(2):
            for t in range(5):
                for slot in range(2):
                    mine = maps[b, call.ids[b, t, slot], 0, t]
                    torch.testing.assert_close(mine, own[b, slot, t], rtol=1e-5, atol=1e-6)
        if one.kind in ("encoder", "cross"):
            assert not visible[1, 0, 5:].any() and visible[1, 0, :5].all()
            assert float(maps[1, :, :, :5, 5:].max()) == 0
        if one.kind in ("causal", "decoder"):
            assert not visible[0, 0, 1:].any() and visible[0, -1].all()


@pytest.mark.parametrize("normalization", ["none", "detached", "full"])
def test_moa_without_an_expert_is_weighed_as_it_weighs(normalization):
    model = heads_models.moa(normalization=normalization)
    experts = routed_experts(model)[0]
    block, hidden, outputs = model.model.layers[0].self_attn, torch.randn(1, 6, 16), []
    with experts.without(2):
        (call,) = calls_of(experts, lambda: outputs.append(block(hidden).output))
    logits = (hidden @ block.router.weight.T).index_fill(-1, torch.tensor([2]), -torch.inf)
    share = logits.softmax(-1)
    best, ids = share.topk(2)
    assert torch.equal(call.ids, ids) and (ids != 2).all()
    expected = best if normalization == "none" else best / best.sum(-1, keepdim=True)
    torch.testing.assert_close(call.weights, expected)
    torch.testing.assert_close(
        outputs[0].double(), heads_models.mixture(call, experts.circuits()), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(block(hidden).routing.logits, hidden @ block.router.weight.T)  # it ends with the block


def test_where_all_experts_are_chosen_the_one_left_out_weighs_nothing():
    model = heads_models.moa(num_experts_per_tok=4)
    experts, hidden = routed_experts(model)[0], torch.randn(1, 5, 16)
    with experts.without(1):
        (call,) = calls_of(experts, lambda: model.model.layers[0].self_attn(hidden))
    assert (call.weights.gather(2, (call.ids == 1).int().argmax(-1, keepdim=True)) == 0).all()
    torch.testing.assert_close(call.weights.sum(-1), torch.ones(1, 5))


def test_an_expert_that_no_token_chooses_is_not_missed_and_any_other_is():
    model, ids = jetmoe(), tokens(1, 2)
    before, unused = model(ids).logits, 0
    for layer in model.model.layers:
        for experts in routed_experts(layer):
            (call,) = calls_of(experts, lambda: model(ids))
            chosen = set(call.ids.flatten().tolist())
            unused += 4 - len(chosen)
            for expert in range(4):
                with experts.without(expert):
                    same = torch.equal(model(ids).logits, before)
                assert same == (expert not in chosen)
    assert unused
