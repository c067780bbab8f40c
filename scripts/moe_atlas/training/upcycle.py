"""Sparse upcycling: a mixture whose experts all begin as the FFN of a dense model (Komatsuzaki et al. 2022)."""

import torch
from torch import nn


@torch.no_grad()
def upcycle(dense: nn.Module, mixture: nn.Module) -> None:
    """Copy a MistralForCausalLM into a MixtralForCausalLM of the same sizes, in place.

    Every expert becomes the layer's FFN and everything else is copied; the router keeps its random
    weights. Mixtral's routing weights sum to 1, so the mixture computes what the dense model does.
    """
    state = mixture.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".mlp." not in name:
            state[name].copy_(tensor)
    for source, target in zip(dense.model.layers, mixture.model.layers, strict=True):
        experts = target.mlp.experts
        experts.gate_up_proj.copy_(
            torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight]).expand_as(experts.gate_up_proj)
        )
        experts.down_proj.copy_(source.mlp.down_proj.weight.expand_as(experts.down_proj))
