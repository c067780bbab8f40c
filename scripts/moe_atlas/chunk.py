"""Some tokens of one layer and site as recorders see them: what was measured, and what several of them need."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from moe_atlas.accumulate import HALF_OCTAVES, angular, half_octaves, pair_cosines, rank_ranges


@dataclass
class Chunk:
    """c tokens, N experts, M compared outputs (the experts, then F, F_same_input and SE where they exist).

    Tensors are on the device of the model unless said otherwise. Derived ones are computed once, when first asked for.
    """

    rows: torch.Tensor  # (c,) int64 on the CPU: places in the text
    first: torch.Tensor  # (c,) bool: position 0 of a sequence
    block: torch.Tensor  # (c,) int64: block of documents
    blocks: int  # number of blocks, B
    own_logits: torch.Tensor  # (c, N) as the router computed them
    logits: torch.Tensor  # (c, N) float32
    router_ids: torch.Tensor  # (c, k) in the model's order, N an empty slot
    router_weights: torch.Tensor  # (c, k) in the same order
    ids: torch.Tensor  # (c, k) largest weight first, -1 an empty slot
    weights: torch.Tensor  # (c, k) in the same order, 0 for an empty slot
    random_ids: torch.Tensor  # (c, k) of a random router
    outputs: torch.Tensor  # (M, c, d)
    activation: torch.Tensor | None  # (N, c, m), None for experts without one
    own_activation: torch.Tensor | None = None  # (c, m') of the dense FFN on its own hidden states

    @property
    def experts(self) -> int:
        """N."""
        return self.logits.shape[1]

    @cached_property
    def cosines(self) -> torch.Tensor:
        """(c, M, M) float64."""
        return pair_cosines(self.outputs)

    @cached_property
    def angles(self) -> torch.Tensor:
        """(c, M, M) float64: angular similarity."""
        return angular(self.cosines)

    @cached_property
    def norms(self) -> torch.Tensor:
        """(c, N) float32: lengths of the experts' outputs."""
        return torch.linalg.vector_norm(self.outputs[: self.experts], dim=-1, dtype=torch.float32).T

    @cached_property
    def ranges(self) -> tuple[torch.Tensor, ...]:
        """Ranks of scores and norms, as rank_ranges gives them."""
        return rank_ranges(self.logits, self.norms)

    @cached_property
    def activity(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the absolute activation: counts (N, bins) int64 in the bins of HALF_OCTAVES, and the share (c,) float64 of
        each token's neurons above 0.001. One expert at a time: bins take twice the memory of the activation."""
        experts, tokens, _ = self.activation.shape
        first, past = HALF_OCTAVES
        counts = torch.empty(experts, past - first, dtype=torch.int64, device=self.activation.device)
        inactive = torch.zeros(tokens, dtype=torch.int64, device=self.activation.device)
        for expert, states in enumerate(self.activation):
            bins = half_octaves(states)
            inactive -= (bins >> 31).sum(1)  # the shift leaves -1 of a negative bin, 0 of any other
            counts[expert] = torch.bincount(bins.sub_(first).flatten(), minlength=past - first)
        return counts, 1 - inactive.to(torch.float64) / self.activation[:, 0].numel()

    @cached_property
    def gates(self) -> torch.Tensor:
        """(c, N) float64: the weight the model applies to each expert, 0 where it was not chosen."""
        return self._scattered(self.weights)

    @cached_property
    def chosen(self) -> torch.Tensor:
        """(c, N) float64: 1 where the expert was chosen, else 0."""
        return self._scattered(self.ids >= 0)

    def _scattered(self, values: torch.Tensor) -> torch.Tensor:
        # One more column takes the empty slots.
        slots = torch.where(self.ids >= 0, self.ids, self.experts)
        result = torch.zeros(len(slots), self.experts + 1, dtype=torch.float64, device=slots.device)
        return result.scatter_(1, slots, values.to(torch.float64))[:, : self.experts]

    @cached_property
    def membership(self) -> torch.Tensor:
        """(2 B, c) float64: 1 where a token is in a group. First B: its block, position 0 left out; then position 0."""
        group = self.block + self.first * self.blocks
        groups = torch.arange(2 * self.blocks, device=group.device)
        return (groups[:, None] == group).to(torch.float64)


class Recorder(Protocol):
    """Keeps something of every chunk of one layer and site, in any order of the chunks."""

    def add(self, chunk: Chunk) -> None:
        """Take the tokens of a chunk."""

    def arrays(self) -> dict[str, torch.Tensor]:
        """What was kept, by the names of activations.safetensors (see results/README.md)."""
