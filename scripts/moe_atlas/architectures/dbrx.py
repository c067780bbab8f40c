"""DBRX: FFN experts outside the experts interface, all of a layer in three matrices of N * m rows."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.models.dbrx import modeling_dbrx

from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.architectures.sites import ALL, Answer, ExpertSite, Observer, multiply


class DbrxSite(ExpertSite):
    """DbrxFFN: w1 under the activation, v1, and w2, which is stored transposed (modeling_dbrx of transformers 5.23)."""

    def __init__(self, module: nn.Module):
        self.block, self.experts, self.router = module, module.experts, module.router.layer
        self.num_experts = self.experts.num_experts
        self.width, self.hidden = self.experts.ffn_hidden_size, self.experts.hidden_size

    def _stack(self, name: str) -> torch.Tensor:
        """One of the three matrices as (N, m, d)."""
        return getattr(self.experts.mlp, name).view(self.num_experts, self.width, self.hidden)

    def answer(self, inputs: torch.Tensor, experts: slice = ALL) -> Answer:
        act, up = (multiply(inputs, self._stack(name)[experts].transpose(1, 2)) for name in ("w1", "v1"))
        activation = self.experts.mlp.activation_fn(act)
        return multiply(activation * up, self._stack("w2")[experts]), activation

    def forward(
        self, observer: Observer, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        inputs = hidden_states.reshape(-1, self.hidden)
        mixture = self._mixture(observer, inputs, ids, weights, 4 * self.width + self.hidden)
        return mixture.view_as(hidden_states)

    @contextlib.contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        self.experts.forward = lambda *args: self.forward(observer, *args)
        try:
            yield
        finally:
            del self.experts.forward

    def bank(self) -> ExpertBank:
        return ExpertBank(self._stack("v1"), self._stack("w1"), self._stack("w2").transpose(1, 2), self.router_weight)


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The experts of a DbrxBlock; none for any other layer."""
    return [DbrxSite(module) for module in layer.modules() if isinstance(module, modeling_dbrx.DbrxFFN)]
