"""The attention experts of a MoA block as an expert site: what every head of the pool answers to every token."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.architectures.moa import AttentionOutput, MoAAttention, Rotation
from moe_atlas.architectures.moa_routing import Routing, choose, weigh
from moe_atlas.architectures.sites import ALL, Answer, ExpertSite, Observer


class MoAAttentionSite(ExpertSite):
    """The output of expert e on a token is W^o_e (and its bias) of the attention that its query W^q_e x gives."""

    name = "attention"

    def __init__(self, module: MoAAttention):
        self.module = self.block = module
        self.router, self.num_experts = module.router, module.num_experts

    def all_heads(
        self, hidden: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None, rotation: Rotation | None
    ) -> torch.Tensor:
        """What every expert's head reads on every token: (B, T, d) and source (B, S, d) -> (B T, N, D)."""
        module = self.module
        bias = None if module.query_bias is None else module.query_bias.flatten()
        query = functional.linear(hidden, module.query.flatten(0, 1), bias)
        query = query.view(*hidden.shape[:2], self.num_experts, module.head_dim).transpose(1, 2)
        read, _ = module.attend(query, source, mask, None, rotation, with_maps=False)
        return read.transpose(1, 2).flatten(0, 1)

    def second_maps(self, read: torch.Tensor, experts: slice = ALL) -> torch.Tensor:
        """(T, g, D) through the output maps of g experts: (g, T, d)."""
        outputs = torch.bmm(read.transpose(0, 1), self.module.output[experts].transpose(1, 2))
        bias = self.module.output_bias
        return outputs if bias is None else outputs + bias[experts, None]

    def forward(
        self,
        observer: Observer,
        hidden: torch.Tensor,
        source: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past_key_values: object = None,
        rotation: Rotation | None = None,
        output_attentions: bool = False,
    ) -> AttentionOutput:
        """As MoAAttention.forward without a cache; there are no maps."""
        module, inputs = self.module, hidden.flatten(0, 1)
        logits = module.router(hidden)
        ids = choose(logits, module.top_k)
        routing = Routing(module.layer, module.kind, logits, ids, weigh(logits, ids, module.normalization))
        read = self.all_heads(hidden, hidden if source is None else source, mask, rotation)
        numbers = sum(module.output.shape[1:])

        def answer(rows: torch.Tensor, experts: slice) -> Answer:
            return self.second_maps(rows[:, experts], experts), None

        weights = routing.weights.flatten(0, 1).to(inputs.dtype)
        mixture = self._mixture(observer, inputs, ids.flatten(0, 1), weights, numbers, answer, read)
        return AttentionOutput(mixture.view_as(hidden), None, routing)

    @contextlib.contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        self.module.forward = lambda *args, **kwargs: self.forward(observer, *args, **kwargs)
        try:
            yield
        finally:
            del self.module.forward


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The MoA blocks of a layer; none for any other layer."""
    return [MoAAttentionSite(module) for module in layer.modules() if isinstance(module, MoAAttention)]
