"""The attention experts of MoA models under the probe: every expert's answer, alone, against the equations."""

import math

import moa_reference as reference
import model_types
import pytest
import torch
from moa_reference import block, states
from transformers import AutoModelForCausalLM

from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.moa_site import MoAAttentionSite
from moe_atlas.architectures.sites import find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.manifest import describe
from moe_atlas.probe import extract


class Outputs:
    """An observer that keeps what it is shown of the tokens it asks for."""

    at_once = 2

    def __init__(self, tokens: list[int]):
        self.asked, self.seen = torch.tensor(tokens), {}

    def tokens(self) -> torch.Tensor:
        return self.asked

    def ready(self, experts: slice) -> None:
        pass

    def done(self, experts: slice) -> None:
        pass

    def record(self, tokens, inputs, logits, ids, weights, outputs) -> None:
        self.seen = {"tokens": tokens, "inputs": inputs, "logits": logits, "ids": ids, "weights": weights}
        self.seen["outputs"] = outputs


def one_expert(made, hidden: torch.Tensor, source: torch.Tensor, expert: int, token: int) -> torch.Tensor:
    """Output (d,) of one expert on one token of a single row."""
    query = made.query[expert] @ hidden[0, token] + made.query_bias[expert]
    seen = source[0, : token + 1] if made.is_causal else source[0]
    scores = seen @ made.key.weight.T @ query + made.key.bias @ query
    read = (scores / math.sqrt(made.head_dim)).softmax(0) @ (seen @ made.value.weight.T + made.value.bias)
    return made.output[expert] @ read + made.output_bias[expert]


@pytest.mark.parametrize("kind", ["causal", "encoder", "cross"])
def test_every_expert_is_asked_on_every_token_also_where_it_was_not_chosen(kind):
    made, hidden = block(kind, attention_bias=True), states(1, 6, 16)
    source = states(1, 4, 16, seed=8) if kind == "cross" else None
    site, observer = MoAAttentionSite(made), Outputs([0, 2, 3, 5])
    with torch.no_grad():
        plain = made(hidden, source)
        with site.observed(observer):
            watched = made(hidden, source)
        assert made.forward.__func__ is type(made).forward  # nobody is attached any more
        torch.testing.assert_close(
            watched.output[0, observer.asked], plain.output[0, observer.asked], atol=1e-6, rtol=0
        )
        assert not watched.output[0, [1, 4]].any()  # taken for padding
        seen, attended = observer.seen, hidden if source is None else source
        for place, token in enumerate(observer.asked.tolist()):
            for expert in range(5):
                expected = one_expert(made, hidden, attended, expert, token)
                torch.testing.assert_close(seen["outputs"][expert, place], expected)
        flat = plain.routing.ids.flatten(0, 1)
        assert torch.equal(seen["ids"], flat[observer.asked])
        torch.testing.assert_close(seen["weights"], plain.routing.weights.flatten(0, 1)[observer.asked])
        torch.testing.assert_close(seen["logits"], plain.routing.logits.flatten(0, 1)[observer.asked].float())


@pytest.mark.parametrize("normalization", ["none", "detached"])
def test_weights_are_recorded_as_the_model_applies_them(normalization, tmp_path):
    model_types.save("moa", tmp_path, normalization=normalization, positions="rotary", norm="pre", frozen_router=True)
    ids = model_types.token_ids([11, 7])
    sites, tensors = extract(Checkpoint(tmp_path), ids, keep_tokens=True)
    assert [(site["layer"], site["site"], site["experts"], site["top_k"]) for site in sites] == [
        (layer, "attention", 8, 3) for layer in (0, 1)
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        routing = [model(torch.tensor([row]), output_routing=True).routing for row in ids]
    for layer in (0, 1):
        own = torch.cat([each[layer].weights[0] for each in routing])
        torch.testing.assert_close(tensors[f"layer_{layer}.attention.weights"], own, atol=1e-5, rtol=0)
        assert ((own.sum(1) - 1).abs().max() > 0.01) == (normalization == "none")


def test_a_moa_model_is_described_by_its_attention_experts_and_its_dense_ffns(tmp_path):
    model_types.save("moa", tmp_path)
    found = describe("moa", "path:moa", "", tmp_path, dense_allowed=False)
    assert (found["N"], found["k"], found["m"], found["attention_experts"]) == (8, 3, 40, True)
    assert (found["moe_layers"], found["dense_layers"]) == ([], [0, 1])


def test_multi_head_attention_has_no_experts(tmp_path):
    model_types.save("moa", tmp_path, attention="mha")
    with pytest.raises(AtlasError, match="the moa model plain has no experts"):
        describe("plain", "path:plain", "", tmp_path, dense_allowed=False)
    assert describe("plain", "path:plain", "", tmp_path, dense_allowed=True)["N"] == 0


def test_other_objectives_are_no_causal_language_models(tmp_path):
    """Their attention blocks are sites all the same, for whoever runs the models himself."""
    config = reference.config(objective="masked")
    config.save_pretrained(tmp_path)
    with pytest.raises(AtlasError, match="MoAForCausalLM is for the objective causal, not masked"):
        describe("masked", "path:masked", "", tmp_path, dense_allowed=False)


def test_sites_of_a_layer_are_its_moa_blocks():
    model = model_types.model("moa")
    for layer in decoder_layers(model):
        (site,) = find_sites(layer)
        assert site.block is layer.self_attn and site.router is layer.self_attn.router and site.shared is None
        with pytest.raises(AtlasError, match="no view of up, act and down"):
            site.bank()
