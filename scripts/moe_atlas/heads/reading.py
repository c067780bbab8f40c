"""A text as a model of attention experts reads it: batches, and where in the text each of their tokens stands.

A causal or masked model reads one side, "text"; a translating one two, "source" and "target". Texts are cut into
windows of the length that the model was trained for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_atlas.probe import make_batches
from moe_atlas.text_index import TextIndex

SIDES = {"encoder": "source", "decoder": "target", "cross": "target"}  # kind -> side, of a model that has two
Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ReadBatch:
    """One call of the model. arguments: its keywords, tensors (b, t). tokens, rows: side -> (n,) int64 places of the
    real tokens among the b * t, and in the index of that side. places (p,): where among the b * t logits a token is
    predicted; labels (p,) which; read (p,): row of the token that is read there, -1 where it is hidden.
    """

    arguments: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    places: torch.Tensor
    labels: torch.Tensor
    read: torch.Tensor
    blocks: torch.Tensor  # (p,) block of documents of each predicted token


@dataclass(frozen=True)
class Reading:
    """A text in batches. index: side -> where its tokens stand."""

    batches: list[ReadBatch]
    index: dict[str, TextIndex]

    def side(self, kind: str) -> str:
        """The side whose tokens experts of this kind are chosen by."""
        return "text" if "text" in self.index else SIDES.get(kind, "target")


def cut(sequences: Ids, documents: Sequence[int], longest: int | None) -> tuple[list[list[int]], list[int]]:
    """Windows of at most `longest` tokens, None for whole sequences, and the document of each; single tokens go."""
    found: list[list[int]] = []
    of: list[int] = []
    for ids, document in zip(sequences, documents, strict=True):
        step = longest or max(len(ids), 1)
        parts = [list(ids[first : first + step]) for first in range(0, len(ids), step)]
        parts = [part for part in parts if len(part) > 1]
        found += parts
        of += [document] * len(parts)
    return found, of


def thinned(sequences: Ids, documents: Sequence[int], most: int) -> tuple[list, list]:
    """Every n-th sequence, with the smallest n that leaves about `most` tokens: a bit of every part of the text."""
    step = max(1, -(-sum(map(len, sequences)) // most))
    return list(sequences[::step]), list(documents[::step])


def causal(sequences: Ids, documents: Sequence[int], batch_tokens: int = 4096) -> Reading:
    """A text in which every token but the first of a sequence is predicted from those before it."""
    index = TextIndex.of(sequences, documents)
    batches = []
    for batch in make_batches(sequences, batch_tokens):
        width = batch.ids.shape[1]
        rows = _spread(batch.ids, batch.tokens, batch.rows)
        following = torch.nn.functional.pad(rows.view(-1, width)[:, 1:], (0, 1), value=-1).flatten()
        places = (following >= 0).nonzero()[:, 0]
        labels = index.token[following[places]]
        arguments = {"input_ids": batch.ids, "attention_mask": (rows >= 0).long().view(-1, width)}
        sides = {"text": batch.tokens}, {"text": batch.rows}
        batches.append(ReadBatch(arguments, *sides, places, labels, rows[places], index.block[following[places]]))
    return Reading(batches, {"text": index})


def masked(
    sequences: Ids, documents: Sequence[int], mask: int, seed: int, share: float = 0.15, batch_tokens: int = 4096
) -> Reading:
    """A text in which a share of the tokens is hidden behind `mask` and predicted; the first of a sequence never is."""
    index = TextIndex.of(sequences, documents)
    drawn = torch.rand(len(index), generator=torch.Generator().manual_seed(seed))
    hidden = (drawn < share) & (index.position > 0)
    batches = []
    for batch in make_batches(sequences, batch_tokens):
        rows = _spread(batch.ids, batch.tokens, batch.rows)
        places = ((rows >= 0) & hidden[rows.clamp(min=0)]).nonzero()[:, 0]
        ids = batch.ids.flatten().index_fill(0, places, mask).view_as(batch.ids)
        arguments = {"input_ids": ids, "attention_mask": (rows >= 0).long().view_as(ids)}
        sides = {"text": batch.tokens}, {"text": batch.rows}
        read = torch.full_like(places, -1)
        batches.append(ReadBatch(arguments, *sides, places, index.token[rows[places]], read, index.block[rows[places]]))
    return Reading(batches, {"text": index})


def paired(sources: Ids, targets: Ids, documents: Sequence[int], pad: int, batch_sentences: int = 64) -> Reading:
    """Sentences with their translations. targets begin with the token that decoding begins with; all that follows in
    them is predicted."""
    index = {"source": TextIndex.of(sources, documents), "target": TextIndex.of(targets, documents)}
    starts = {side: np.cumsum([0, *map(len, ids)]) for side, ids in (("source", sources), ("target", targets))}
    order = sorted(range(len(sources)), key=lambda i: (len(targets[i]), len(sources[i]), i))
    batches = []
    for first in range(0, len(order), batch_sentences):
        own = order[first : first + batch_sentences]
        given, rows, tokens = {}, {}, {}
        for side, ids in (("source", sources), ("target", targets)):
            last = 1 if side == "target" else 0  # what is predicted last is not read
            width = max(len(ids[i]) - last for i in own)
            given[side] = torch.full((len(own), width), pad)
            spread = torch.full((len(own), width), -1)
            for place, i in enumerate(own):
                length = len(ids[i]) - last
                given[side][place, :length] = torch.tensor(ids[i][:length])
                spread[place, :length] = starts[side][i] + torch.arange(length)
            tokens[side] = (spread.flatten() >= 0).nonzero()[:, 0]
            rows[side] = spread.flatten()[tokens[side]]
        arguments = {
            "input_ids": given["source"],
            "attention_mask": _real(given["source"], tokens["source"]),
            "decoder_input_ids": given["target"],
        }
        read = rows["target"]
        labels, blocks = index["target"].token[read + 1], index["target"].block[read]
        batches.append(ReadBatch(arguments, tokens, rows, tokens["target"], labels, read, blocks))
    return Reading(batches, index)


def _spread(ids: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(b * t,) rows of the tokens, -1 for padding."""
    return torch.full((ids.numel(),), -1).index_copy(0, tokens, rows)


def _real(ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros(ids.numel(), dtype=torch.int64).index_fill(0, tokens, 1).view_as(ids)
