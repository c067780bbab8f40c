"""Intermediate states of experts, a = sigma(W_act x), before the product with the up branch.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendix H: the states token by token (figure 12) and
the share of neurons with |a| > 0.001, there without its distribution.
"""

import torch

from moe_atlas.accumulate import HALF_OCTAVES, half_octave_edges
from moe_atlas.chunk import Chunk

_OCTAVES = 16  # of the histogram, below 0.001 and above it


def edges() -> torch.Tensor:
    """Edges of the histogram of |a|, (66,) float64: 0, then 0.001 / 2**16 to 0.001 * 2**16, as float32 has them.

    Bin i holds edge i - 1 < |a| <= edge i: bin 0 the zeros, down to 3e-40, and bin 66 what is above the last edge.
    """
    return torch.cat([torch.zeros(1), half_octave_edges(2 * _OCTAVES)]).to(torch.float64)


class ActivationHistogram:
    """Counts of |a| over tokens and neurons for each of N experts, in the bins between `edges`."""

    def __init__(self, experts: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(experts, HALF_OCTAVES[1] - HALF_OCTAVES[0], dtype=torch.int64, device=device)

    def add(self, chunk: Chunk) -> None:
        if chunk.activation is None:
            return
        self.counts += chunk.activity[0]

    def arrays(self) -> dict[str, torch.Tensor]:
        """activation_histogram (N, 67) int64, activation_edges (66,) float64; none for experts without activation."""
        if not self.counts.any():
            return {}
        first, last = (2 * octaves - HALF_OCTAVES[0] for octaves in (-_OCTAVES, _OCTAVES))
        zero, low = self.counts[:, :1], self.counts[:, 1:first].sum(1, keepdim=True)
        high = self.counts[:, last:].sum(1, keepdim=True)
        histogram = torch.cat([zero, low, self.counts[:, first:last], high], 1)
        return {"activation_histogram": histogram, "activation_edges": edges()}


class States:
    """The states of every token of a short text in float32, with F's where the dense reference has as many neurons.

    kept: (T, N or N + 1, m), or None before a token is added; labels: whose states they are.
    """

    def __init__(self, tokens: int, experts: int):
        self.tokens = tokens
        self.labels = [str(expert) for expert in range(experts)]
        self.kept: torch.Tensor | None = None

    def add(self, chunk: Chunk) -> None:
        states, own = chunk.activation, chunk.own_activation
        if states is None:
            return
        states = states.transpose(0, 1)
        if own is not None and own.shape[1] == states.shape[2]:
            states = torch.cat([states, own[:, None].to(states.dtype)], 1)
            self.labels = [*self.labels[: chunk.experts], "F"]
        if self.kept is None:
            self.kept = torch.empty(self.tokens, *states.shape[1:], dtype=torch.float32)
        self.kept[chunk.rows] = states.to("cpu", torch.float32)
