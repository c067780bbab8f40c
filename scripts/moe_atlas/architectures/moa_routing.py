"""The router of a mixture of attention heads: logits, choice, weights, and the two losses of their distribution."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.architectures.moa_config import MoAConfig


class Routing(NamedTuple):
    """What the router of one attention block decided.

    layer: index in its stack. kind: causal, encoder, decoder or cross. logits (B, T, E) float32 or better; ids
    (B, T, k) int64, largest logit first, or 0 to E - 1 where k = E, as nothing is chosen then; weights (B, T, k) in
    the dtype of the logits. Padding has a routing too, which means nothing.
    """

    layer: int
    kind: str
    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """Logits of the experts: a linear map without bias. weight: (E, d).

    Computed in float32 or better, also where the model is in bfloat16: a choice between near logits would else depend
    on their rounding. With `frozen` no gradient reaches the weight.
    """

    def __init__(self, config: MoAConfig):
        super().__init__()
        self.frozen = config.frozen_router
        weight = torch.empty(config.num_attention_experts, config.hidden_size)
        self.weight = nn.Parameter(weight, requires_grad=not self.frozen)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., E) of hidden (..., d)."""
        weight = self.weight.detach() if self.frozen else self.weight
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.to(dtype), weight.to(dtype))


def choose(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids (..., k) of the largest of logits (..., E), largest first; 0 to E - 1 where all are chosen."""
    experts = logits.shape[-1]
    if top_k == experts:
        return torch.arange(experts, device=logits.device).expand(logits.shape)
    return logits.detach().topk(top_k, dim=-1).indices


def weigh(logits: torch.Tensor, ids: torch.Tensor, normalization: str) -> torch.Tensor:
    """Weights (..., k) of the chosen experts: logits (..., E), ids (..., k).

    With S the sum of the chosen p and d_im = 1 where i = m, the gradients of w_i by the logit l_m are
    "none" p_i (d_im - p_m), "detached" w_i (d_im - p_m), both for all m, and "full" w_i (d_im - w_m) for chosen m and
    0 for others. So at k = 1 only "full" gives its router no gradient ("detached": MoA,
    2210.05144, section 3; "full": JetMoE, 2404.07413, section 2.2).
    """
    if normalization == "full":
        return logits.gather(-1, ids).softmax(-1)
    weights = logits.softmax(-1).gather(-1, ids)
    return weights if normalization == "none" else weights / weights.sum(-1, keepdim=True).detach()


def balance_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """E times the sum over experts of f_i P_i: share of the choices, and of the router's probability.

    logits (B, T, E), ids (B, T, k); mask (B, T), 0 or False for padding, which is left out. Balanced choices give 1,
    all tokens on the same k experts with certainty E / k; k = E gives 1 whatever the router says. The gradient goes
    through P alone (Switch, 2101.03961, equation 4).
    """
    experts = logits.shape[-1]
    kept = logits.new_ones(logits.shape[:-1]) if mask is None else mask.to(logits.dtype)
    count = kept.sum().clamp(min=1)
    repeated = kept[..., None].expand(ids.shape).flatten()
    chosen = torch.zeros(experts, dtype=logits.dtype, device=logits.device).index_add(0, ids.flatten(), repeated)
    probability = (logits.softmax(-1) * kept[..., None]).flatten(0, -2).sum(0)
    return experts * (chosen @ probability) / (count * count * ids.shape[-1])


def z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens that are not padding of the squared logsumexp of logits (B, T, E); mask (B, T)."""
    squared = logits.logsumexp(-1).square()
    if mask is None:
        return squared.mean()
    kept = mask.to(logits.dtype)
    return (squared * kept).sum() / kept.sum().clamp(min=1)
