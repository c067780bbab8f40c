"""Language models with MoA or multi-head attention: losses, padding, caches, generation, and their way to disk."""

import copy

import moa_reference as reference
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from moe_atlas import architectures
from moe_atlas.architectures.moa_routing import balance_loss, z_loss

AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "translation": AutoModelForSeq2SeqLM}
GENERATING = ["causal", "translation"]
ATTENTIONS = ["moa", "mha"]


def build(objective: str, attention: str = "moa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A small model in float64, in eval mode, with weights far from their initial values."""
    architectures.register()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AUTO[objective].from_config(reference.config(objective=objective, attention=attention, **changes))
        for parameter in model.parameters():
            parameter.data.add_(0.5 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("objective", AUTO)
def test_a_model_computes_the_equations(objective, norm):
    """Against the same written out once more, vector by vector; both round angles in their own precision."""
    model, source, target = build(objective, norm=norm, attention_bias=True), tokens(1, 5), tokens(1, 4, seed=2)
    with torch.no_grad():
        if objective == "translation":
            ours = model(source, decoder_input_ids=target).logits
            encoded = reference.stack(model.encoder, source[0].tolist())
            states = reference.stack(model.decoder, target[0].tolist(), encoded)
        else:
            ours, states = model(source).logits, reference.stack(model.model, source[0].tolist())
        expected = states @ model.get_input_embeddings().weight.T
        torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("objective", AUTO)
def test_a_saved_model_comes_back_bit_for_bit(objective, attention, tmp_path):
    model = build(objective, attention, frozen_router=True, attention_bias=True).float()
    model.save_pretrained(tmp_path)
    loaded, report = AUTO[objective].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and type(loaded) is type(model)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    ids = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).logits, loaded(ids, labels=ids).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    loaded(ids, labels=ids).loss.backward()
    without = {name for name, parameter in loaded.named_parameters() if parameter.grad is None}
    assert without == {name for name in state if "router" in name} and bool(without) == (attention == "moa")


def test_a_model_is_loaded_by_the_class_of_its_objective_only(tmp_path):
    build("masked").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MoAForCausalLM is for the objective causal, not masked"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "other"}, "objective is 'other'"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_encoder_layers": 1}, "num_encoder_layers is 1 for the objective causal"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim is 5"),
        ({"normalization": "half"}, "normalization is 'half'"),
    ],
)
def test_values_that_make_no_model_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        reference.config(**changes)


# --- losses


@pytest.mark.parametrize("objective", AUTO)
def test_the_loss_is_cross_entropy_plus_the_scaled_losses_of_every_block(objective):
    model = build(objective, balance_loss=0.3, z_loss=0.07)
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        made = model(ids, attention_mask=mask, labels=labels)
    wanted = labels[:, 1:] if objective == "causal" else labels
    log_p = made.logits[:, : wanted.shape[1]].log_softmax(-1)
    places = [(row, place) for row in range(2) for place in range(wanted.shape[1]) if wanted[row, place] != -100]
    task = -sum(log_p[row, place, wanted[row, place]] for row, place in places) / len(places)
    close(made.task_loss, task)
    balance = [balance_loss(one.logits, one.ids, mask) for one in made.routing]
    zs = [z_loss(one.logits, mask) for one in made.routing]
    close(made.loss, made.task_loss + 0.3 * sum(balance) + 0.07 * sum(zs))
    close(made.balance_loss, sum(balance) / len(balance))
    close(made.z_loss, sum(zs) / len(zs))
    kinds = {
        "causal": [("causal", 0), ("causal", 1)],
        "masked": [("encoder", 0), ("encoder", 1)],
        "translation": [("encoder", 0), ("encoder", 1)]
        + [(kind, layer) for layer in (0, 1) for kind in ("decoder", "cross")],
    }[objective]
    assert [(one.kind, one.layer) for one in made.routing] == kinds


def test_routing_is_given_with_labels_or_when_it_is_asked_for():
    model, other, ids = build("causal"), build("causal", "mha"), tokens(1, 4)
    assert model(ids).routing is None and model(ids, labels=ids, output_routing=False).routing is None
    assert len(model(ids, output_routing=True).routing) == 2
    made = other(ids, labels=ids, output_routing=True)
    assert made.routing is None and made.balance_loss is None and torch.equal(made.loss, made.task_loss)
    model.config.output_routing = True
    assert len(model(ids).routing) == 2


def test_labels_are_smoothed_while_training_only():
    model, ids = build("masked", label_smoothing=0.2), tokens(1, 6)
    with torch.no_grad():
        plain, smooth = model(ids, labels=ids), model.train()(ids, labels=ids)
    close(plain.task_loss, functional.cross_entropy(plain.logits[0], ids[0]))
    close(smooth.task_loss, functional.cross_entropy(plain.logits[0], ids[0], label_smoothing=0.2))


# --- padding and causality


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_padding_changes_nothing_at_other_places(objective, attention, side, positions):
    model, ids = build(objective, attention, positions=positions), tokens(2, 8)
    kept = slice(3, None) if side == "left" else slice(None, 5)
    mask = torch.zeros_like(ids)
    mask[0], mask[1, kept] = 1, 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_attentions=True)
        alone = model(ids[1:, kept])
        close(padded.logits[1:, kept], alone.logits)
        close(model(ids, attention_mask=mask).logits[1:, kept], alone.logits)  # without maps, another kernel
        close(padded.logits[:1], model(ids[:1]).logits)
        other = ids.clone()
        other[mask == 0] = 7
        changed = model(other, attention_mask=mask, labels=other.masked_fill(mask == 0, -100))
        close(changed.loss, padded.loss)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_of_sources_and_targets_changes_nothing(attention):
    model, source, target = build("translation", attention), tokens(2, 8), tokens(2, 6, seed=2)
    mask, labels = torch.ones_like(source), target.clone()
    mask[1, 5:], labels[1, 4:] = 0, -100
    with torch.no_grad():
        both = model(source, attention_mask=mask, labels=labels)
        alone = [model(source[:1], labels=target[:1]), model(source[1:, :5], labels=target[1:, :4])]
    close(both.logits[:1], alone[0].logits)
    close(both.logits[1:, :4], alone[1].logits)
    close(both.task_loss, (6 * alone[0].task_loss + 4 * alone[1].task_loss) / 10)
    source[1, 5:] = 9
    close(model(source, attention_mask=mask, labels=labels).loss, both.loss)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_only_an_encoder_sees_what_comes_later(attention):
    first, second = tokens(1, 8), tokens(1, 8)
    second[0, 5:] = (second[0, 5:] + 11) % 47 + 3
    with torch.no_grad():
        causal, masked, pair = (build(objective, attention) for objective in AUTO)
        assert torch.equal(causal(first).logits[:, :5], causal(second).logits[:, :5])
        assert not torch.isclose(masked(first).logits[:, :5], masked(second).logits[:, :5]).all(-1).any()
        ours, others = (pair(first, decoder_input_ids=ids).logits for ids in (first, second))
        assert torch.equal(ours[:, :5], others[:, :5])
        other_source = pair(second, decoder_input_ids=first).logits
        assert not torch.isclose(other_source, ours).all(-1).any()


# --- caches and generation


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_token_by_token_with_a_cache_gives_what_one_pass_gives(attention, positions):
    causal, pair = (build(objective, attention, positions=positions) for objective in GENERATING)
    ids, source = tokens(2, 7), tokens(2, 5, seed=3)
    for cache in (DynamicCache(config=causal.config), StaticCache(causal.config, max_cache_len=9)):
        with torch.no_grad():
            steps = [causal(part, past_key_values=cache, use_cache=True).logits for part in ids.split([3, 1, 1, 2], 1)]
            close(torch.cat(steps, dim=1), causal(ids).logits)
    past, steps = None, []
    with torch.no_grad():
        encoded = pair.get_encoder()(source)
        for part in ids.split(1, dim=1):
            step = pair(decoder_input_ids=part, encoder_outputs=encoded, past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
        close(torch.cat(steps, dim=1), pair(source, decoder_input_ids=ids).logits)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("objective", GENERATING)
def test_generation_with_a_cache_gives_what_it_gives_without(objective, attention, beams):
    """Also of a row beside a longer one; greedy tokens are those of the largest logits, taken one by one."""
    model, ids = build(objective, attention), tokens(3, 6)
    mask = torch.ones_like(ids)
    kept = slice(2, None) if objective == "causal" else slice(None, 4)
    mask[1] = 0
    mask[1, kept] = 1
    ids[mask == 0] = 0
    options = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False, "eos_token_id": 2}
    cached, plain = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    alone = model.generate(ids[1:2, kept], attention_mask=mask[1:2, kept], **options)
    assert torch.equal(alone[0, -7:], cached[1, -7:]) and len({tuple(row) for row in cached[:, -7:].tolist()}) > 1
    if beams == 1:
        made = ids[:1] if objective == "causal" else torch.tensor([[1]])
        for _ in range(7):
            given = {} if objective == "causal" else {"decoder_input_ids": made}
            logits = model(made if objective == "causal" else ids[:1], **given).logits
            made = torch.cat([made, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(made[0], cached[0])


# --- training


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("objective", AUTO)
def test_checkpointed_gradients_are_the_plain_ones(objective, norm):
    plain, ids = build(objective, norm=norm), tokens(2, 7)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None, name
        close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_router_stays_what_it_was_and_others_do_not(frozen):
    model, ids = build("causal", frozen_router=frozen), tokens(2, 7)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (frozen and "router" in name), name


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("objective", AUTO)
def test_a_model_learns_a_batch_by_heart(objective, attention):
    torch.manual_seed(0)
    architectures.register()
    model = AUTO[objective].from_config(reference.config(objective=objective, attention=attention, norm="pre"))
    source, target = tokens(4, 6), tokens(4, 6, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, labels = (target, target) if objective == "causal" else (source, target)
    for _ in range(60):
        optimizer.zero_grad()
        made = model(inputs, labels=labels)
        made.loss.backward()
        optimizer.step()
    assert made.task_loss < 0.5  # of log 50 = 3.9; a causal model cannot know the first tokens, and is not asked


def test_routers_start_without_ties_unless_nothing_is_chosen():
    architectures.register()
    torch.manual_seed(0)
    chosen, whole = (
        AutoModelForCausalLM.from_config(reference.config(num_experts_per_tok=k), dtype=torch.float32) for k in (2, 5)
    )
    frozen = AutoModelForCausalLM.from_config(reference.config(num_experts_per_tok=5, frozen_router=True))
    weights = [model.model.layers[0].self_attn.router.weight for model in (chosen, whole, frozen)]
    assert not weights[1].any() and weights[2].any()
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.3)
    first = chosen(tokens(4, 8), output_routing=True).routing[0]
    assert len(first.ids[..., 0].unique()) == 5


def test_maps_are_given_when_they_are_asked_for():
    model, source, target = build("translation"), tokens(2, 5), tokens(2, 4)
    with torch.no_grad():
        plain = model(source, decoder_input_ids=target)
        made = model(source, decoder_input_ids=target, output_attentions=True, output_hidden_states=True)
    close(made.logits, plain.logits)
    shapes = {"encoder_attentions": (2, 2, 5, 5), "decoder_attentions": (2, 2, 4, 4), "cross_attentions": (2, 2, 4, 5)}
    for name, shape in shapes.items():
        maps = made[name]
        assert getattr(plain, name) is None and [each.shape for each in maps] == [shape, shape]
        for each in maps:
            close(each.sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
    assert len(made.decoder_hidden_states) == len(made.encoder_hidden_states) == 3
    close(made.decoder_hidden_states[-1] @ model.lm_head.weight.T, made.logits)
