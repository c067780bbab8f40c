"""Some tokens of one layer and site as recorders see them: what was measured, and what several of them need."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from moe_atlas.accumulate import angular, pair_cosines, rank_ranges


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
    outputs: torch.Tensor  # (N, c, d) of the experts
    others: torch.Tensor | None = None  # (M - N, c, d) of what they are compared with
    active: torch.Tensor | None = None  # (c,) float64: share of all experts' neurons above 0.001, where they have some

    @property
    def experts(self) -> int:
        """N."""
        return self.logits.shape[1]

    @cached_property
    def cosines(self) -> torch.Tensor:
        """(c, M, M) float64."""
        return pair_cosines(*([self.outputs] if self.others is None else [self.outputs, self.others]))

    @cached_property
    def angles(self) -> torch.Tensor:
        """(c, M, M) float64: angular similarity."""
        return angular(self.cosines)

    @cached_property
    def norms(self) -> torch.Tensor:
        """(c, N) float32: lengths of the experts' outputs."""
        return torch.linalg.vector_norm(self.outputs, dim=-1, dtype=torch.float32).T

    @cached_property
    def ranges(self) -> tuple[torch.Tensor, ...]:
        """Ranks of scores and norms, as rank_ranges gives them."""
        return rank_ranges(self.logits, self.norms)

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
