"""The mask form of EMoE on dense FFNs of transformers models: what is chosen, what it leaves, what it passes on."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    MistralConfig,
    MistralModel,
    MixtralConfig,
    MixtralModel,
    T5Config,
    T5Model,
)

from moe_atlas.emoe import mask as mask_module
from moe_atlas.emoe.ffns import dense_ffns
from moe_atlas.emoe.mask import ExpertMask
from moe_atlas.emoe.split import gate_vectors
from moe_atlas.errors import AtlasError

H, F, N, K = 16, 24, 6, 2
SHARED = {"vocab_size": 50}


def t5(kind: str) -> T5Model:
    return T5Model(T5Config(d_model=H, d_ff=F, d_kv=8, num_layers=2, num_heads=2, feed_forward_proj=kind, **SHARED))


BERT = {"hidden_size": H, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2, **SHARED}
MODELS = {
    "mistral": lambda: MistralModel(MistralConfig(num_key_value_heads=2, **BERT)),
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=H, n_inner=F, n_layer=2, n_head=2, **SHARED)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "t5": lambda: t5("relu"),
    "t5-gated": lambda: t5("gated-gelu"),
}
FAMILIES = pytest.mark.parametrize("family", MODELS)
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def build(family: str) -> torch.nn.Module:
    """A tiny random model; biases, which begin at zero, are drawn too."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def output(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    return model(**inputs).last_hidden_state


def labels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(F) % N)


def key_of(model: torch.nn.Module, family: str, layer: int) -> torch.Tensor:
    """The keys (F, H) by the names of the family's own modules."""
    return {
        "mistral": lambda: model.layers[layer].mlp.gate_proj.weight,
        "gpt2": lambda: model.h[layer].mlp.c_fc.weight.T,
        "bert": lambda: model.encoder.layer[layer].intermediate.dense.weight,
        "t5": lambda: model.encoder.block[layer].layer[1].DenseReluDense.wi.weight,
        "t5-gated": lambda: model.encoder.block[layer].layer[1].DenseReluDense.wi_0.weight,
    }[family]()


@FAMILIES
def test_finds_every_ffn_and_its_keys(family):
    model = build(family)
    ffns = dense_ffns(model)
    assert [ffn.layer for ffn in ffns] == list(range(4 if family.startswith("t5") else 2))
    for ffn in ffns[:2]:
        assert ffn.neurons == F and torch.equal(ffn.keys, key_of(model, family, ffn.layer))
        assert ffn.keys.data_ptr() == key_of(model, family, ffn.layer).data_ptr()
        assert (ffn.bias is None) == (family not in ("gpt2", "bert"))


def test_a_mixture_has_no_dense_ffn():
    config = MixtralConfig(num_key_value_heads=2, num_local_experts=2, **BERT)
    with pytest.raises(AtlasError, match="no dense FFN of a known layout"):
        dense_ffns(MixtralModel(config))


@FAMILIES
def test_mask_off_gives_the_dense_model_back_and_all_experts_are_the_dense_model(family):
    model = build(family)
    dense = output(model)
    ffns = dense_ffns(model)
    with ExpertMask(ffns[1], labels(), K):
        assert (output(model) - dense).abs().max() > 1e-4
    assert torch.equal(output(model), dense)
    with ExpertMask(ffns[1], labels(), N) as mask:
        assert torch.equal(output(model), dense)
        assert mask.chosen.all()


@FAMILIES
def test_gate_is_the_mean_pre_activation_less_the_mean_bias(family):
    model = build(family)
    ffn = dense_ffns(model)[0]
    heard = []
    hook = ffn.first.register_forward_hook(lambda _module, _input, out: heard.append(out.detach().double()))
    with ExpertMask(ffn, labels(), K) as mask:
        output(model)
    hook.remove()
    bias = torch.zeros(F) if ffn.bias is None else ffn.bias.detach()
    for expert in range(N):
        members = torch.from_numpy(labels() == expert)
        expected = heard[0][..., members].mean(-1) - bias[members].double().mean()
        torch.testing.assert_close(mask.scores[..., expert].double(), expected, rtol=1e-5, atol=1e-6)


@FAMILIES
def test_unselected_neurons_get_no_gradient_and_no_output(family):
    """One token chooses k experts: the keys of the others have a gradient of exactly 0."""
    model = build(family)
    ffn = dense_ffns(model)[1]
    activations = []
    with ExpertMask(ffn, labels(), K) as mask:
        # Hooks run in the order in which they were put on: this one sees what the mask lets through.
        hook = ffn.last.register_forward_pre_hook(lambda _module, arguments: activations.append(arguments[0]))
        inputs = {"input_ids": IDS[:1, :1]}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = IDS[:1, :1]
        model(**inputs).last_hidden_state.square().sum().backward()
        hook.remove()
    selected = mask.chosen.flatten()[torch.from_numpy(labels())]
    assert selected.sum() == F // N * K
    assert (activations[0].flatten()[~selected] == 0).all()
    weight = ffn.first.weight.grad
    gradient = weight.T if family == "gpt2" else weight
    assert (gradient[~selected] == 0).all()
    if family != "t5":  # a ReLU that is off passes nothing on
        assert (gradient[selected].abs().amax(1) > 0).all()


def test_gate_follows_the_weights_after_an_optimiser_step():
    model = build("mistral")
    ffn = dense_ffns(model)[0]
    optimiser = torch.optim.SGD([ffn.first.weight], lr=5.0)
    heard = []
    hook = ffn.first.register_forward_hook(lambda _module, _input, out: heard.append(out.detach()))
    with ExpertMask(ffn, labels(), K) as mask:
        output(model).square().sum().backward()
        before = mask.scores.clone()
        optimiser.step()
        output(model)
    hook.remove()
    expected = torch.stack([heard[1][..., torch.from_numpy(labels() == e)].mean(-1) for e in range(N)], -1)
    torch.testing.assert_close(mask.scores, expected, rtol=1e-4, atol=1e-5)
    assert (mask.scores - before).abs().max() > 0.01


def test_gate_of_keys_that_are_not_tuned_is_made_once_each_time_it_is_put_on(monkeypatch):
    """Of frozen weights it is the same for every batch; taken off, the mask forgets it, as the weights may change."""
    model, made = build("mistral"), []
    monkeypatch.setattr(mask_module, "gate_vectors", lambda *args: made.append(1) or gate_vectors(*args))
    ffn = dense_ffns(model.requires_grad_(False))[0]
    mask = ExpertMask(ffn, labels(), K).install()
    output(model), output(model)
    before = mask.scores
    assert len(made) == 1
    mask.remove()
    ffn.first.weight.neg_()
    with mask:
        output(model)
        torch.testing.assert_close(mask.scores, -before, rtol=0, atol=1e-6)
        ffn.first.weight.requires_grad_(True)
        output(model)
    assert len(made) == 3


@FAMILIES
def test_choosing_by_hand(family):
    """top, bottom, rest, random and fixed against sorted scores."""
    model = build(family)
    ffn = dense_ffns(model)[0]
    chosen = {}
    for choose in ("top", "bottom", "rest", "random", (0, 3)):
        with ExpertMask(ffn, labels(), K, choose=choose) as mask:
            output(model)
            chosen[choose] = mask.chosen
    order = mask.scores.argsort(-1)
    for row, scores in enumerate(order.flatten(0, -2).tolist()):
        picked = {choose: set(np.flatnonzero(x.flatten(0, -2)[row]).tolist()) for choose, x in chosen.items()}
        assert picked["top"] == set(scores[-K:]) and picked["bottom"] == set(scores[:K])
        assert picked["rest"] == set(scores[:-K]) and picked[(0, 3)] == {0, 3} and len(picked["random"]) == K
    shares = chosen["random"].float().flatten(0, -2).mean(0)
    assert (shares > 0).all()


def test_magnitude_is_the_sum_of_absolute_activations():
    model = build("bert")
    ffn = dense_ffns(model)[0]
    heard = []
    hook = ffn.last.register_forward_pre_hook(lambda _module, arguments: heard.append(arguments[0].double()))
    with ExpertMask(ffn, labels(), K, score="magnitude") as mask:
        output(model)
    hook.remove()
    for expert in range(N):
        expected = heard[0][..., torch.from_numpy(labels() == expert)].abs().sum(-1)
        torch.testing.assert_close(mask.scores[..., expert].double(), expected, rtol=1e-5, atol=1e-6)


class Fixed(torch.nn.Module):
    """A router of one linear map."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(H, N)

    def forward(self, hidden):
        return self.map(hidden)


@pytest.mark.parametrize("weights", ["one", "softmax"])
def test_a_learned_router_weighs_experts_and_gets_a_gradient(weights):
    model, router = build("mistral"), Fixed()
    ffn = dense_ffns(model)[1]
    seen = {}
    first = ffn.last.register_forward_pre_hook(lambda _module, arguments: seen.update(before=arguments[0]))
    with ExpertMask(ffn, labels(), K, score=router, weights=weights) as mask:
        last = ffn.last.register_forward_pre_hook(lambda _module, arguments: seen.update(after=arguments[0]))
        output(model).square().sum().backward()
    first.remove()
    last.remove()
    soft = torch.where(mask.chosen, mask.scores, -torch.inf).softmax(-1)
    expected = mask.chosen.float() if weights == "one" else soft
    torch.testing.assert_close(seen["after"], seen["before"] * expected[..., torch.from_numpy(labels())])
    assert router.map.weight.grad.abs().max() > 0


def test_random_choices_repeat_with_the_seed():
    model = build("gpt2")
    ffn = dense_ffns(model)[0]
    drawn = []
    for seed in (0, 0, 1):
        with ExpertMask(ffn, labels(), K, choose="random", seed=seed) as mask:
            output(model)
            drawn.append(mask.chosen)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_permuting_the_neurons_with_their_labels_changes_nothing():
    model = build("mistral")
    other = copy.deepcopy(model)
    order = np.random.default_rng(3).permutation(F)
    mlp = other.layers[1].mlp
    with torch.no_grad():
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight.copy_(matrix.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    with ExpertMask(dense_ffns(model)[1], labels(), K), ExpertMask(dense_ffns(other)[1], labels()[order], K):
        torch.testing.assert_close(output(model), output(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": N + 1}, "7 cannot be chosen"),
        ({"labels": labels()[1:]}, "24 neurons"),
        ({"choose": (0, 6)}, "fixed choice"),
        ({"choose": "best"}, "choose is one of"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(AtlasError, match=message):
        ExpertMask(dense_ffns(build("gpt2"))[0], **{"labels": labels(), "k": K, **settings})
