"""How far experts look, and how differently two of them look from the same token.

Every expert is evaluated on every token, chosen or not, so that experts are compared on the same tokens. Distances and
divergences are means over the heads of an expert, and are summed by block of documents.
"""

import itertools

import numpy as np
import torch

from moe_atlas.behavioral.measures import divide
from moe_atlas.heads.frames import Row, drawn, null

EXCHANGES = 200
_BITS = 1 / np.log(2)


class MapSums:
    """Sums over tokens of one layer's maps. distance (B, E), divergence (B, E, E), uniform (B,), tokens (B,).

    divergence: Jensen-Shannon, bits. distance: sum_s a |t - s| tokens; uniform: that of an even map over what is seen.
    """

    def __init__(self, experts: int, blocks: int):
        self.distance, self.divergence = np.zeros((blocks, experts)), np.zeros((blocks, experts, experts))
        self.uniform, self.tokens = np.zeros(blocks), np.zeros(blocks)

    def add(self, maps: torch.Tensor, visible: torch.Tensor, places: torch.Tensor, blocks: np.ndarray) -> None:
        """Add n tokens of one sequence: maps (n, E, H, S), visible (n, S) bool, places (n,) their t, blocks (n,)."""
        steps = (places[:, None] - torch.arange(maps.shape[-1], device=maps.device)).abs().double()
        far = torch.einsum("nehs,ns->ne", maps.double(), steps) / maps.shape[2]
        seen = visible.double()
        np.add.at(self.distance, blocks, far.cpu().numpy())
        np.add.at(self.uniform, blocks, ((steps * seen).sum(1) / seen.sum(1)).cpu().numpy())
        np.add.at(self.tokens, blocks, 1)
        entropies = torch.special.entr(maps).sum(-1)  # (n, E, H)
        for one in range(maps.shape[1] - 1):
            other = slice(one + 1, None)
            mixed = torch.special.entr((maps[:, one, None] + maps[:, other]) / 2).sum(-1)
            found = (mixed - (entropies[:, one, None] + entropies[:, other]) / 2).clamp(min=0).mean(-1)
            found = found.double().cpu().numpy() * _BITS
            np.add.at(self.divergence[:, one, other], blocks, found)
            np.add.at(self.divergence[:, other, one], blocks, found)


def map_rows(
    sums: MapSums, drawn_blocks: np.ndarray, generator: np.random.Generator, distances: bool = True
) -> list[Row]:
    """Rows of moa_maps; `distances` False leaves them out, where queries and keys are of different texts.

    The null exchanges the experts in each block, all pairs of a block by one permutation.
    """
    rows: list[Row] = []
    blocks, experts = sums.distance.shape
    tokens = sums.tokens.sum()
    below = drawn_blocks @ sums.tokens
    orders = generator.permuted(np.tile(np.arange(experts), (EXCHANGES, blocks, 1)), axis=2)
    at = np.arange(blocks)
    if distances:
        exchanged = divide(sums.distance[at[:, None], orders].sum(1), tokens)
        uniform = float(divide(sums.uniform.sum(), tokens))
        for expert in range(experts):
            value = divide(drawn_blocks @ sums.distance[:, expert], below)
            fields = {"measure": "distance", "a": str(expert), "uniform": uniform, "tokens": int(tokens)}
            rows.append(fields | drawn(value, 0) | null(exchanged[:, expert]))
    for a, b in itertools.combinations(range(experts), 2):
        exchanged = divide(sums.divergence[at, orders[..., a], orders[..., b]].sum(1), tokens)
        value = divide(drawn_blocks @ sums.divergence[:, a, b], below)
        fields = {"measure": "divergence", "a": str(a), "b": str(b), "tokens": int(tokens)}
        rows.append(fields | drawn(value, 0, 1) | null(exchanged))
    return rows
