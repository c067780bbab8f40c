"""Which rule leads from a router's logits to the experts it chooses and the weights it applies: bounds over tokens.

The rule is found from what the model did and not from its config. For every score function that routers have, the
ratio of the score to the applied weight is bounded over all tokens: a constant ratio is a rule, and its inverse the
scale. For every way to choose, the tokens whose experts it gives are counted. behavioral/router_rule.py names the rule.
Bounds and counts are joined without rounding, so they do not depend on the order of the tokens or on their chunks.
"""

import math

import torch
from torch.nn import functional

from moe_atlas.tables import CHOOSING_SCORES, GROUPINGS, SCORES


def scores(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The score functions that do not depend on the choice: logits (T, N) to scores (T, N), by their names in SCORES.

    A softmax over the chosen experts only is the softmax over all, divided by its sum over the chosen.
    """
    return {
        "softmax": logits.softmax(-1),
        "sigmoid": logits.sigmoid(),
        "sqrt softplus": functional.softplus(logits).sqrt(),
        "identity": logits,
    }


def sparsemixer(logits: torch.Tensor, top_k: int, jitter: float) -> torch.Tensor:
    """Scores (T, N) float64 of SparseMixer at inference (Liu et al., GRIN, 2409.12136).

    The largest logit gets its softmax over the logits s with (max - s) / max(|s|, max) <= 2 jitter; then it is taken
    out, and the next one likewise, k times. Other experts get 0. The threshold is computed in the logits' dtype.
    """
    result = torch.zeros(logits.shape, dtype=torch.float64)
    remaining = logits
    for _ in range(min(top_k, logits.shape[-1])):
        largest, index = remaining.max(-1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * jitter
        kept = remaining.masked_fill(far, -torch.inf).double().softmax(-1)
        result.scatter_(-1, index, kept.gather(-1, index))
        remaining = remaining.scatter(-1, index, -torch.inf)
    return result


def group_scores(values: torch.Tensor, groups: int) -> dict[str, torch.Tensor]:
    """Scores (T, groups) of equal groups of neighbouring experts, by their names in GROUPINGS.

    Largest score of a group: DeepSeek-V2 (2405.04434, 2.2.2). Sum of its two largest: DeepSeek-V3 (2412.19437, 2.1.2).
    """
    best = values.unflatten(-1, (groups, -1)).topk(min(2, values.shape[-1] // groups), dim=-1).values
    return {"largest": best[..., 0], "two largest": best.sum(-1)}


def is_choice(
    values: torch.Tensor, rounding: torch.Tensor, chosen: torch.Tensor, allowed: torch.Tensor | None
) -> torch.Tensor:
    """Whether the chosen experts (T, N) bool are the largest `values` (T, N) among the allowed ones: (T,) bool.

    rounding (T, N): how far each value may be off. Values that this may exchange are ties, of which any may be chosen.
    """
    others = ~chosen if allowed is None else allowed & ~chosen
    smallest = (values + rounding).masked_fill(~chosen, torch.inf).amin(-1)
    largest = (values - rounding).masked_fill(~others, -torch.inf).amax(-1)
    agrees = smallest >= largest
    return agrees if allowed is None else agrees & ~(chosen & ~allowed).any(-1)


class RouterRule:
    """Bounds and counts of one router with N experts.

    bias: (N,) what the router adds to its scores before it chooses. groups: (groups of experts, groups that are chosen
    from). jitter: threshold of SparseMixer. Each is None where the router has none.
    """

    def __init__(
        self,
        experts: int,
        bias: torch.Tensor | None = None,
        groups: tuple[int, int] | None = None,
        jitter: float | None = None,
    ):
        self.experts, self.groups, self.jitter = experts, groups, jitter
        self.bias = None if bias is None else bias.detach().to("cpu", torch.float32).flatten()
        bounds = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
        self.ratio = bounds.repeat(2, len(SCORES), experts, 1)
        self.spread = torch.full((len(SCORES),), -math.inf, dtype=torch.float64)
        self.weight_sum = bounds.clone()
        self.selection = torch.full((len(CHOOSING_SCORES), 2, len(GROUPINGS)), -1, dtype=torch.int64)
        self.selection[:, : 1 if bias is None else 2, : 1 if groups is None else None] = 0
        self.epsilon = self.logit_error = 0.0

    def add(
        self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, recorded: torch.Tensor | None = None
    ) -> None:
        """Add tokens, on any device.

        logits (T, N) in the dtype in which the router computed them; ids (T, k) int64, an id of N is an empty slot;
        weights (T, k) as the model applies them; recorded (T, N): logits of another computation, compared with these.
        """
        logits, ids, weights = logits.detach().cpu(), ids.cpu(), weights.detach().cpu()
        if recorded is not None and len(logits):
            difference = (recorded.detach().cpu().double() - logits.double()).abs().max()
            self.logit_error = max(self.logit_error, difference.item())
        self.epsilon = max(self.epsilon, torch.finfo(weights.dtype).eps)
        if len(logits):
            self._add_weights(logits, ids, weights)
            self._add_selection(logits.float(), ids)

    def _add_weights(self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        used, slots = ids < self.experts, ids.clamp(max=self.experts - 1)
        tiny = torch.finfo(weights.dtype).tiny
        weights = weights.double()
        total = weights.masked_fill(~used, 0).sum(-1)
        self.weight_sum[0].clamp_(max=total.min())
        self.weight_sum[1].clamp_(min=total.max())
        # A router may only choose, and give each expert the same weight.
        named = scores(logits.double()) | {"constant": torch.ones_like(logits, dtype=torch.float64)}
        if self.jitter is not None:
            named["sparsemixer"] = sparsemixer(logits, ids.shape[1], self.jitter)
        for index, name in enumerate(SCORES):
            if name not in named:
                continue
            # A negative score is no weight. Score over weight, and not the inverse: an identity may be next to 0.
            own = named[name].gather(-1, slots).clamp_min(0)
            share = own / own.masked_fill(~used, 0).sum(-1, keepdim=True)
            for normalised, score in enumerate((own, share)):
                # What underflows in the model's precision says nothing about the rule.
                counted = used & ~((score < tiny) & (weights < 1000 * tiny))
                ratio = (score / weights).nan_to_num(nan=torch.inf, posinf=torch.inf)
                low, high = ratio.masked_fill(~counted, torch.inf), ratio.masked_fill(~counted, -torch.inf)
                bounds = self.ratio[normalised, index]
                for column, values, kind in ((0, low, "amin"), (1, high, "amax")):
                    bounds[:, column] = bounds[:, column].scatter_reduce(0, slots.flatten(), values.flatten(), kind)
                if normalised == 0 and bool((several := counted.sum(-1) > 1).any()):
                    within = (1 - low.amin(-1) / high.amax(-1)).nan_to_num(nan=1.0)
                    self.spread[index] = self.spread[index].maximum(within[several].max())

    def _add_selection(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        chosen = torch.zeros(len(ids), self.experts + 1, dtype=torch.bool).scatter_(-1, ids, True)[:, : self.experts]
        for index, score in enumerate(scores(logits).values()):
            for biased, bias in enumerate((None, self.bias)):
                if biased and bias is None:
                    continue
                values = score if bias is None else score + bias
                # The score is rounded, and its sum with the bias; both in no coarser dtype than the weights'.
                rounding = self.epsilon / 2 * (score.abs() + values.abs())
                self.selection[index, biased, 0] += int(is_choice(values, rounding, chosen, None).sum())
                if self.groups is None:
                    continue
                groups, kept = self.groups
                for grouping, by_group in group_scores(values, groups).items():
                    best = torch.zeros(by_group.shape, dtype=torch.bool).scatter_(-1, by_group.topk(kept).indices, True)
                    allowed = best.repeat_interleave(self.experts // groups, -1)
                    agrees = is_choice(values, rounding, chosen, allowed)
                    self.selection[index, biased, GROUPINGS.index(grouping)] += int(agrees.sum())

    def arrays(self) -> dict[str, torch.Tensor]:
        """The bounds and counts by the names of activations.safetensors (see results/README.md)."""
        return {
            "rule_ratio": self.ratio,
            "rule_spread": self.spread,
            "rule_weight_sum": self.weight_sum,
            "rule_selection": self.selection,
            "rule_epsilon": torch.tensor([self.epsilon], dtype=torch.float64),
            "rule_logit_error": torch.tensor([self.logit_error], dtype=torch.float64),
        }
