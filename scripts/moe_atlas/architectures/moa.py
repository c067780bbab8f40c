"""Mixture of Attention Heads (MoA), and multi-head attention with the same interface.

An expert is one attention head: a query projection and an output projection. Keys and values are shared by all
experts of a block. A router chooses k experts a query token; y_t is the sum over them of w_i o_i W^o_i with
o_i = softmax(q_t W^q_i (X W^k)^T / sqrt(D)) X W^v (Zhang et al. 2022, arXiv 2210.05144, section 3). Both sums of
products are evaluated in one of two ways that give the same numbers: all experts and then the chosen ones, or tokens
sorted by expert. Nothing is kept on the modules between calls, so that they can be checkpointed and called again.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, EncoderDecoderCache

from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_routing import Router, Routing, choose, weigh

DISPATCHES = ("auto", "gather", "sparse")
# On a processor all experts are evaluated where they are at most so many times k and d is at most so large: two large
# products then take no more time than many small ones (measured on one core, 1536 tokens, d = 128). On a GPU they
# always do: with 64 experts of 256 sorting took eleven times as long (benchmarks/moa.py, an H200).
GATHER_FACTOR, GATHER_HIDDEN = 4, 256
Rotation = tuple[torch.Tensor, torch.Tensor]


class AttentionOutput(NamedTuple):
    """What an attention block gives: output (B, T, d); maps (B, slots or heads, T, S) or None; routing or None."""

    output: torch.Tensor
    maps: torch.Tensor | None
    routing: Routing | None


def rotate(states: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary positions: states (B, h, T, D) turned by cos and sin (B or 1, T, D), halves as in transformers."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    dropout: float,
    with_maps: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention: query (B, h, T, D), key and value (B, h or 1, S, D) -> (B, h, T, D), maps.

    mask: (B, 1, T, S), bool (True is seen) or added to the scores; with None everything is seen, or with `causal`
    what is not later, the last query being at the last key. maps: (B, h, T, S) before dropout, if they are asked for.
    """
    length, seen = query.shape[2], key.shape[2]
    if causal and mask is None and length > 1 and (with_maps or length != seen):
        mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
    if not with_maps:
        key, value = (part.expand(-1, query.shape[1], -1, -1) for part in (key, value))
        flat = causal and mask is None and length > 1
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=flat), None
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    maps = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return functional.dropout(maps, dropout) @ value, maps


class _Attention(nn.Module):
    """Keys, values and their cache, which both attentions have alike. kind: causal, decoder, encoder or cross."""

    def __init__(self, config: MoAConfig, layer: int, kind: str):
        super().__init__()
        self.layer, self.kind, self.head_dim = layer, kind, config.head_dim
        self.is_causal = kind in ("causal", "decoder")
        self.dropout = config.attention_dropout

    def keys_and_values(
        self, source: torch.Tensor, past: Cache | None, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, S, D) of a source (B, S, d), together with those of the cache."""
        if isinstance(past, EncoderDecoderCache):
            if self.kind == "cross" and past.is_updated.get(self.layer):
                cached = past.cross_attention_cache.layers[self.layer]
                return cached.keys, cached.values
            if self.kind == "cross":
                past.is_updated[self.layer] = True
            past = past.cross_attention_cache if self.kind == "cross" else past.self_attention_cache
        shape = (*source.shape[:2], -1, self.head_dim)
        key, value = (part(source).view(shape).transpose(1, 2) for part in (self.key, self.value))
        if rotation is not None:
            key = rotate(key, rotation)
        return (key, value) if past is None else past.update(key, value, self.layer)

    def attend(
        self,
        query: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor | None,
        past: Cache | None,
        rotation: Rotation | None,
        with_maps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries (B, h, T, D) attend to a source (B, S, d): what they read (B, h, T, D), and maps (B, h, T, S)."""
        if rotation is not None:
            query = rotate(query, rotation)
        key, value = self.keys_and_values(source, past, rotation)
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, mask, self.is_causal, dropout, with_maps)


class MoAAttention(_Attention):
    """E attention heads with shared keys and values, k of them a token.

    Parameters: router.weight (E, d), query (E, D, d), output (E, d, D), key.weight and value.weight (D, d); with
    attention_bias also query_bias (E, D), output_bias (E, d), key.bias and value.bias (D,). The bias of an expert's
    output is weighed as its output is. `dispatch` is "gather" (all experts, then the chosen), "sparse" (tokens sorted
    by expert) or "auto", the quicker one for the size.
    """

    def __init__(self, config: MoAConfig, layer: int, kind: str):
        super().__init__(config, layer, kind)
        experts, width, hidden = config.num_attention_experts, config.head_dim, config.hidden_size
        self.num_experts, self.top_k, self.dispatch = experts, config.num_experts_per_tok, "auto"
        self.normalization = config.normalization
        self.router = Router(config)
        self.query = nn.Parameter(torch.empty(experts, width, hidden))
        self.output = nn.Parameter(torch.empty(experts, hidden, width))
        self.query_bias = nn.Parameter(torch.empty(experts, width)) if config.attention_bias else None
        self.output_bias = nn.Parameter(torch.empty(experts, hidden)) if config.attention_bias else None
        self.key = nn.Linear(hidden, width, bias=config.attention_bias)
        self.value = nn.Linear(hidden, width, bias=config.attention_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        source: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        rotation: Rotation | None = None,
        output_attentions: bool = False,
    ) -> AttentionOutput:
        """Attend from hidden (B, T, d) to itself, or to source (B, S, d).

        mask: (B, 1, T, S) bool, True is seen, or added to the scores; None: all, or what is not later in a causal
        block. rotation: cos and sin (B or 1, T, D) of rotary positions. Slot j of the maps (B, k, T, S) holds the
        expert routing.ids[:, :, j].
        """
        logits = self.router(hidden)
        ids = choose(logits, self.top_k)
        routing = Routing(self.layer, self.kind, logits, ids, weigh(logits, ids, self.normalization))
        flat, ids = hidden.flatten(0, 1), ids.flatten(0, 1)
        query = self.queries(flat, ids).view(*hidden.shape[:2], self.top_k, self.head_dim).transpose(1, 2)
        source = hidden if source is None else source
        read, maps = self.attend(query, source, mask, past_key_values, rotation, output_attentions)
        read = read.transpose(1, 2).reshape(-1, self.top_k, self.head_dim)
        mixed = self.mix(read, ids, routing.weights.flatten(0, 1).to(read.dtype))
        return AttentionOutput(mixed.view_as(hidden), maps, routing)

    def gathers(self) -> bool:
        """Whether all experts are evaluated on every token."""
        if self.dispatch not in DISPATCHES:
            raise ValueError(f"dispatch is {self.dispatch!r}; it may be {', '.join(DISPATCHES)}.")
        if self.dispatch != "auto":
            return self.dispatch == "gather"
        few = self.num_experts <= GATHER_FACTOR * self.top_k and self.query.shape[-1] <= GATHER_HIDDEN
        return few or self.top_k == self.num_experts or self.query.device.type != "cpu"

    def queries(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Queries of the chosen experts: tokens (n, d), ids (n, k) -> (n, k, D)."""
        if not self.gathers():
            return _sorted_by_expert(tokens[:, None].expand(-1, ids.shape[1], -1), ids, self.query, self.query_bias)
        bias = None if self.query_bias is None else self.query_bias.flatten()
        every = functional.linear(tokens, self.query.flatten(0, 1), bias)
        if self.top_k == self.num_experts:
            return every.view(*ids.shape, -1)
        return every.view(-1, self.head_dim)[_rows(ids, self.num_experts)].view(*ids.shape, -1)

    def mix(self, read: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: read (n, k, D), ids and weights (n, k) -> (n, d)."""
        weighed = read * weights[..., None]
        if self.gathers():
            if self.top_k < self.num_experts:
                every = weighed.new_zeros(len(read) * self.num_experts, self.head_dim)
                weighed = every.index_copy(0, _rows(ids, self.num_experts), weighed.flatten(0, 1))
            by_width = self.output.transpose(0, 1).flatten(1)  # (d, E D)
            mixed = functional.linear(weighed.view(len(read), -1), by_width)
        else:
            mixed = _sorted_by_expert(weighed, ids, self.output, None).sum(1)
        if self.output_bias is not None:
            every = weights.new_zeros(len(read), self.num_experts).scatter(1, ids, weights)
            mixed = mixed + every @ self.output_bias
        return mixed


def _rows(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Places (n k,) of ids (n, k) among n times E rows."""
    return (ids + experts * torch.arange(len(ids), device=ids.device)[:, None]).flatten()


def _sorted_by_expert(
    inputs: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each slot's input (n, k, i) through its expert's map: ids (n, k), weight (E, o, i), bias (E, o) -> (n, k, o)."""
    order = ids.flatten().argsort(stable=True)
    sizes = ids.flatten().bincount(minlength=len(weight)).tolist()
    parts = inputs.reshape(-1, inputs.shape[-1])[order].split(sizes)
    # Taken apart once: the gradient of each weight[expert] would be as large as all of them.
    biases = [None] * len(weight) if bias is None else bias.unbind()
    outputs = [functional.linear(*part) for part in zip(parts, weight.unbind(), biases, strict=True)]
    joined = torch.cat(outputs)
    return torch.empty_like(joined).index_copy(0, order, joined).view(*ids.shape, -1)


class MultiHeadAttention(_Attention):
    """Multi-head attention with heads * head_dim that need not be d (Vaswani et al. 2017, section 3.2.2).

    Parameters: query, key and value.weight (H D, d), output.weight (d, H D), and their biases with attention_bias.
    """

    def __init__(self, config: MoAConfig, layer: int, kind: str):
        super().__init__(config, layer, kind)
        inner, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
        self.query = nn.Linear(hidden, inner, bias=config.attention_bias)
        self.key = nn.Linear(hidden, inner, bias=config.attention_bias)
        self.value = nn.Linear(hidden, inner, bias=config.attention_bias)
        self.output = nn.Linear(inner, hidden, bias=config.attention_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        source: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        rotation: Rotation | None = None,
        output_attentions: bool = False,
    ) -> AttentionOutput:
        """As MoAAttention.forward; maps (B, heads, T, S), no routing."""
        query = self.query(hidden).view(*hidden.shape[:2], -1, self.head_dim).transpose(1, 2)
        source = hidden if source is None else source
        read, maps = self.attend(query, source, mask, past_key_values, rotation, output_attentions)
        return AttentionOutput(self.output(read.transpose(1, 2).flatten(2)), maps, None)


def attention(config: MoAConfig, layer: int, kind: str) -> nn.Module:
    """The attention block that a configuration asks for."""
    return (MoAAttention if config.attention == "moa" else MultiHeadAttention)(config, layer, kind)
