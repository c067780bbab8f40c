"""Small models of attention experts with random weights, and their layers written out a second time."""

from pathlib import Path

import families
import torch

from moe_atlas.architectures import register
from moe_atlas.architectures.attention_experts import Call, Circuits, routed_experts
from moe_atlas.architectures.moa_config import MoAConfig

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "router_initializer_range": 0.5,
}


def moa(objective: str = "causal", **changes: object) -> torch.nn.Module:
    """A MoA model in eval mode, float32."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    register()
    loaders = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "translation": AutoModelForSeq2SeqLM}
    layers = {"num_encoder_layers": 2} if objective == "translation" else {}
    torch.manual_seed(0)
    config = MoAConfig(**(SMALL | layers | {"objective": objective} | changes))
    model = loaders[objective].from_config(config).eval().requires_grad_(False)
    for experts in routed_experts(model):
        experts.router.weight.normal_(0, 0.5)  # where k = E it begins with zeros
    return model


def save_moa(directory: Path, objective: str = "causal", **changes: object) -> torch.nn.Module:
    """The same, written to a folder."""
    model = moa(objective, **changes)
    model.save_pretrained(directory)
    return model


def save_jetmoe(directory: Path, **changes: object) -> torch.nn.Module:
    """A JetMoE of two heads an expert, written to a folder."""
    own = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return families.save("jetmoe", directory, **(own | changes))


def mixture(call: Call, circuits: Circuits, source: torch.Tensor | None = None) -> torch.Tensor:
    """Output (b, t, d) of a layer of attention experts in float64, slot by slot and head by head, without biases."""
    maps, _ = call.maps()
    source = (call.inputs if source is None else source).double()
    heads = circuits.key.shape[0]
    out = torch.zeros(call.inputs.shape, dtype=torch.float64)
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            for slot, expert in enumerate(call.ids[b, t].tolist()):
                for h in range(heads):
                    read = maps[b, expert, h, t].double() @ source[b] @ circuits.value[h].double().T
                    out[b, t] += float(call.weights[b, t, slot]) * circuits.output[expert, h].double() @ read
    return out
