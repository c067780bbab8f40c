"""JetMoE: FFN experts outside the experts interface, and attention experts (Mixture of Attention Heads).

transformers gathers tokens by expert in its own code; here every expert is evaluated in token order.
An attention expert is a pair of a query and an output projection; keys and values are shared by all
(Zhang et al., 2210.05144, section 3; JetMoE, 2404.07413, section 2.2).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.jetmoe import modeling_jetmoe

from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.architectures.sites import ALL, Answer, ExpertSite, Observer


class _JetMoeSite(ExpertSite):
    """What both kinds of JetMoE experts have in common: the router and two stacks of linear maps."""

    def __init__(self, module: nn.Module, experts: nn.Module):
        self.module = self.block = module
        self.experts = experts
        self.router = experts.router.layer
        self.top_k = experts.router.top_k
        self.first, self.second = experts.input_linear, experts.output_linear
        self.num_experts = self.first.num_experts

    def route(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, N), ids (T, k) and weights (T, k) as JetMoeTopKGating makes them: top-k, then softmax."""
        logits = self.experts.router(inputs)[4]
        values, ids = logits.topk(self.top_k, dim=1)
        return logits, ids, torch.softmax(values, dim=1).type_as(inputs)

    def first_maps(self, inputs: torch.Tensor, experts: slice = ALL) -> torch.Tensor:
        """(T, d) through the first map of g experts in one product: (T, g, o)."""
        weight = self.first.weight[experts]
        return functional.linear(inputs, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])

    def second_maps(self, inner: torch.Tensor, experts: slice = ALL) -> torch.Tensor:
        """(T, g, i) through the second map of g experts: (g, T, d)."""
        return torch.bmm(inner.transpose(0, 1), self.second.weight[experts].transpose(1, 2))

    @contextlib.contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        self.module.forward = lambda *args, **kwargs: self.forward(observer, *args, **kwargs)
        try:
            yield
        finally:
            del self.module.forward


class JetMoeFFNSite(_JetMoeSite):
    """JetMoeMoE: gated experts, first half of the input projection under the activation."""

    name = "ffn"

    def answer(self, inputs: torch.Tensor, experts: slice = ALL) -> Answer:
        act, up = self.first_maps(inputs, experts).chunk(2, dim=-1)
        activation = self.module.activation(act)
        return self.second_maps(activation * up, experts), activation.transpose(0, 1)

    def forward(self, observer: Observer, layer_input: torch.Tensor) -> torch.Tensor:
        inputs = layer_input.reshape(-1, layer_input.shape[-1])
        _, ids, weights = self.route(inputs)
        numbers = 2 * self.first.output_size + self.second.output_size
        mixture = self._mixture(observer, inputs, ids, weights, numbers)
        return mixture.view_as(layer_input) + self.module.bias

    def bank(self) -> ExpertBank:
        act, up = self.first.weight.chunk(2, dim=1)
        return ExpertBank(up, act, self.second.weight, self.router_weight)


class JetMoeAttentionSite(_JetMoeSite):
    """JetMoeAttention: the output of expert e on a token is W_o,e of the attention its query W_q,e x gives."""

    name = "attention"

    def all_heads(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: tuple, **kwargs
    ) -> torch.Tensor:
        """What every expert's heads read on every token: (b, t, d) -> (b * t, N, H * head_dim)."""
        attention = self.module
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        query = self.first_maps(hidden.flatten(0, 1)).reshape(shape).transpose(1, 2)
        key, value = (part.view(shape).transpose(1, 2) for part in attention.kv_proj(hidden).chunk(2, dim=-1))
        query, key = modeling_jetmoe.apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, modeling_jetmoe.eager_attention_forward
        )
        key, value = (part.repeat(1, self.num_experts, 1, 1) for part in (key, value))
        read, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        return read.reshape(-1, self.num_experts, self.first.output_size)

    def forward(self, observer: Observer, hidden_states: torch.Tensor, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "use_cache")}
        inputs = hidden_states.flatten(0, 1)
        logits, ids, weights = self.route(inputs)
        read = self.all_heads(hidden_states, **kwargs)
        numbers = self.first.output_size + self.second.output_size

        def answer(rows: torch.Tensor, experts: slice) -> Answer:
            return self.second_maps(rows[:, experts], experts), None

        mixture = self._mixture(observer, inputs, ids, weights, numbers, answer, read)
        return mixture.view_as(hidden_states) + self.experts.bias, None, logits


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """Attention and FFN experts of a JetMoeDecoderLayer; none for any other layer."""
    sites: list[ExpertSite] = []
    for module in layer.modules():
        if isinstance(module, modeling_jetmoe.JetMoeAttention):
            sites.append(JetMoeAttentionSite(module, module.experts))
        elif isinstance(module, modeling_jetmoe.JetMoeMoE):
            sites.append(JetMoeFFNSite(module, module))
    return sites
