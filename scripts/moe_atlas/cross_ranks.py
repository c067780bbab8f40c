"""Norms of experts against scores of experts, each pair of them: what a norm-score statistic is under a permutation.

A router can agree with the norms by chance: one expert is large, and its row happens to score high. Whether it is
chance shows from the same norms with the router's rows given to other experts, and these sums hold all such pairings.
"""

import torch

from moe_atlas.chunk import Chunk


class CrossRanks:
    """Sums over tokens, position 0 left out, by [expert of the norm, expert of the score].

    cross_largest: tokens on which the one has the largest norm and the other the highest score; ties share the count.
    cross_rank: products of centred ranks, each token's divided by the lengths of both rank vectors, so that the
    diagonal adds up to Spearman's correlation. For any permutation p of the experts, entries [p(e), e] add up to what
    the statistic would be if the router's row e were that of expert p(e).
    """

    def __init__(self, experts: int, device: torch.device):
        self.largest = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        self.rank = torch.zeros_like(self.largest)
        self.tokens = 0

    def add(self, chunk: Chunk) -> None:
        score_low, score_high, norm_low, norm_high = (bound[~chunk.first] for bound in chunk.ranges)
        self.tokens += len(score_low)
        self.largest += _top(norm_low, norm_high).T @ _top(score_low, score_high)
        self.rank += _centred(norm_low, norm_high).T @ _centred(score_low, score_high)

    def arrays(self) -> dict[str, torch.Tensor]:
        """cross_largest, cross_rank (N, N) float64 and cross_tokens (1,) int64."""
        tokens = torch.tensor([self.tokens], dtype=torch.int64)
        return {"cross_largest": self.largest, "cross_rank": self.rank, "cross_tokens": tokens}


def _top(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(c, N) float64: 1 for the expert with the highest rank, shared by equals."""
    return (high == low.shape[-1]).to(torch.float64) / (high - low)


def _centred(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(c, N) float64 average ranks about their mean, of length 1; zeros where all are equal."""
    ranks = (low + high - low.shape[-1]).to(torch.float64)
    return ranks / torch.linalg.vector_norm(ranks, dim=-1, keepdim=True).clamp_min(1e-12)
