"""What is kept of a pass for one set of experts: every choice of every token, or sums of attention maps."""

import numpy as np
import torch
from torch.nn import functional

from moe_atlas.architectures.attention_experts import Call, RoutedExperts
from moe_atlas.choices import random_router
from moe_atlas.heads.maps import MapSums
from moe_atlas.heads.reading import ReadBatch, Reading
from moe_atlas.text_index import TextIndex


class ChoiceRecord:
    """Choices of the T tokens of a side: ids (T, k), random_ids (T, k), weights (T, k); numpy, in the text's order.

    random_ids: of a router with rows of random direction and the same lengths, on the same hidden states.
    """

    def __init__(self, experts: RoutedExperts, reading: Reading):
        self.experts, self.side = experts, reading.side(experts.kind)
        self.index: TextIndex = reading.index[self.side]
        shape = len(self.index), experts.top_k
        self.ids, self.random_ids = np.full(shape, -1, dtype=np.int32), np.full(shape, -1, dtype=np.int32)
        self.weights = np.zeros(shape, dtype=np.float32)
        self._random: torch.Tensor | None = None

    @torch.no_grad()
    def see(self, batch: ReadBatch, call: Call) -> None:
        if self._random is None:
            self._random = random_router(self.experts.router_weight, seed=self.experts.layer).float()
        tokens, rows = batch.tokens[self.side], batch.rows[self.side].numpy()
        tokens = tokens.to(call.ids.device)
        logits = functional.linear(call.inputs.flatten(0, 1)[tokens].float(), self._random)
        random_ids = logits.topk(self.experts.top_k, dim=-1).indices
        for kept, found in (
            (self.ids, call.ids.flatten(0, 1)[tokens]),
            (self.random_ids, random_ids),
            (self.weights, call.weights.flatten(0, 1)[tokens].float()),
        ):
            kept[rows] = found.cpu().numpy()

    @property
    def counted(self) -> np.ndarray:
        """(T,) bool: tokens that are read, first ones of a sequence aside."""
        return (self.index.position.numpy() > 0) & (self.ids[:, 0] >= 0)


class MapRecord:
    """Sums of attention maps of the tokens of a side, one sequence at a time; first tokens left out."""

    def __init__(self, experts: RoutedExperts, reading: Reading):
        self.experts, self.side = experts, reading.side(experts.kind)
        self.index = reading.index[self.side]
        self.sums = MapSums(experts.experts, self.index.blocks)

    @torch.no_grad()
    def see(self, batch: ReadBatch, call: Call) -> None:
        if call.maps is None:
            return
        maps, visible = call.maps()
        width = maps.shape[-2]
        tokens, rows = batch.tokens[self.side], batch.rows[self.side]
        kept = self.index.position[rows] > 0
        tokens, rows = tokens[kept], rows[kept]
        for sequence in range(len(maps)):
            own = tokens // width == sequence
            places = (tokens[own] % width).to(maps.device)
            if len(places):
                chosen = maps[sequence].permute(2, 0, 1, 3)[places]
                self.sums.add(chosen, visible[sequence][places], places, self.index.block[rows[own]].numpy())
