"""Intermediate states of experts, a = sigma(W_act x), before the product with the up branch.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendix H: the states token by token (figure 12) and
the share of neurons with |a| > 0.001, there without its distribution.
"""

import torch

from moe_atlas.accumulate import HALF_OCTAVES, half_octave_edges, half_octaves

_OCTAVES = 16  # of the histogram, below 0.001 and above it
_PATTERNS = 1 << 15  # of a 16-bit float without its sign
_AT_A_TIME = 1 << 20  # numbers


def edges() -> torch.Tensor:
    """Edges of the histogram of |a|, (66,) float64: 0, then 0.001 / 2**16 to 0.001 * 2**16, as float32 has them.

    Bin i holds edge i - 1 < |a| <= edge i: bin 0 the zeros, down to 3e-40, and bin 66 what is above the last edge.
    """
    return torch.cat([torch.zeros(1), half_octave_edges(2 * _OCTAVES)]).to(torch.float64)


class ActivationHistogram:
    """Counts of |a| over tokens and neurons for each of N experts, in the bins between `edges`."""

    def __init__(self, experts: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(experts, HALF_OCTAVES[1] - HALF_OCTAVES[0], dtype=torch.int64, device=device)
        self._of_pattern: dict[torch.dtype, torch.Tensor] = {}

    def add(self, experts: slice, activation: torch.Tensor) -> torch.Tensor:
        """Take the activation (g, c, m) of some experts; (c,) int64: how many of a token's neurons are at most 0.001.

        Few tokens of one expert at a time, so that what is made of them stays in the caches.
        """
        inactive = torch.zeros(activation.shape[1], dtype=torch.int64, device=activation.device)
        count, rows = self._halves if activation.dtype.itemsize == 2 else self._bins, _AT_A_TIME // activation.shape[2]
        for own, states in zip(self.counts[experts], activation, strict=True):
            inactive += torch.cat([count(own, some) for some in states.split(max(1, rows))])
        return inactive

    def _bins(self, counts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        bins = half_octaves(states)
        below = -(bins >> 31).sum(1)  # the shift leaves -1 of a negative bin, 0 of any other
        counts += torch.bincount(bins.sub_(HALF_OCTAVES[0]).flatten(), minlength=len(counts))
        return below

    def _halves(self, counts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """As `_bins`, for 16-bit floats: there are so few that each is counted, and put into its bin afterwards."""
        bins = self._bins_of_patterns(states.dtype)
        patterns = states.contiguous().view(torch.int16).bitwise_and(_PATTERNS - 1)
        found = torch.bincount(patterns.flatten(), minlength=_PATTERNS)
        counts += torch.zeros_like(counts).index_add_(0, bins - HALF_OCTAVES[0], found)
        return (patterns < int((bins < 0).sum())).sum(1, dtype=torch.int32)

    def _bins_of_patterns(self, dtype: torch.dtype) -> torch.Tensor:
        """Bin of every positive number of a 16-bit dtype, in ascending order."""
        if dtype not in self._of_pattern:
            values = torch.arange(_PATTERNS, dtype=torch.int16, device=self.counts.device).view(dtype)
            self._of_pattern[dtype] = half_octaves(values).long()
        return self._of_pattern[dtype]

    def arrays(self) -> dict[str, torch.Tensor]:
        """activation_histogram (N, 67) int64, activation_edges (66,) float64."""
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
        self.tokens, self.experts = tokens, experts
        self.labels = [str(expert) for expert in range(experts)]
        self.kept: torch.Tensor | None = None

    def add(
        self, rows: torch.Tensor, experts: slice, activation: torch.Tensor, own: torch.Tensor | None = None
    ) -> None:
        """Take the activation (g, c, m) of some experts on the tokens at places (c,) of the text, and F's (c, m')."""
        compared = own is not None and own.shape[1] == activation.shape[2]
        if self.kept is None:
            self.labels += ["F"] * compared
            self.kept = torch.empty(self.tokens, len(self.labels), activation.shape[2], dtype=torch.float32)
        self.kept[rows, experts] = activation.transpose(0, 1).to("cpu", torch.float32)
        if compared:
            self.kept[rows, self.experts] = own.to("cpu", torch.float32)
