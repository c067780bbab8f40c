"""Where each token of a text stands: its sequence, its position, and the block of documents it belongs to.

Tokens of one document are no independent observations, so an interval is made over documents. Few numbers are kept
for each block of documents, however long the text: as many blocks as documents where there are few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_BLOCKS = 32


@dataclass(frozen=True)
class TextIndex:
    """The T tokens of a text in order of sequence and position: (T,) int64 tensors on the CPU.

    token: ids. sequence and position: from 0. block: from 0 to `blocks` - 1, each of them with tokens.
    """

    token: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor
    blocks: int

    def __len__(self) -> int:
        return len(self.token)

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], documents: Sequence[int] | None = None, max_blocks: int = MAX_BLOCKS
    ) -> "TextIndex":
        """Index of token id lists; `documents` names the document of each, by default one for each sequence.

        Blocks are runs of documents in the order of the text with about the same number of tokens: one document
        each where at most `max_blocks` have tokens. Raises ValueError when documents and sequences differ in number.
        """
        documents = range(len(sequences)) if documents is None else documents
        if len(documents) != len(sequences):
            raise ValueError(f"{len(sequences)} sequences of {len(documents)} documents")
        lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
        sizes: dict[int, int] = {}
        for document, ids in zip(documents, sequences, strict=True):
            if ids:
                sizes[document] = sizes.get(document, 0) + len(ids)
        block_of = dict(zip(sizes, _runs(list(sizes.values()), max_blocks), strict=True))
        blocks = torch.tensor([block_of.get(document, 0) for document in documents], dtype=torch.int64)
        total, starts = int(lengths.sum()), lengths.cumsum(0) - lengths
        token = torch.empty(total, dtype=torch.int64)
        for start, ids in zip(starts.tolist(), sequences, strict=True):
            token[start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return cls(
            token,
            torch.arange(len(sequences)).repeat_interleave(lengths),
            torch.arange(total) - starts.repeat_interleave(lengths),
            blocks.repeat_interleave(lengths),
            max(block_of.values(), default=-1) + 1,
        )


def _runs(sizes: list[int], most: int) -> list[int]:
    """Number of the run of each item: at most `most` runs, none of them empty, of about equal total size."""
    runs, run, inside = [], 0, 0
    left, count = sum(sizes), min(most, len(sizes))
    for number, size in enumerate(sizes):
        target = (left + inside) / max(count - run, 1)
        enough = inside + size / 2 > target  # to stop here is nearer to the target than to go on
        needed = len(sizes) - number < count - run  # each run that is still to come needs an item of its own
        if inside and run < count - 1 and (enough or needed):
            run, inside = run + 1, 0
        runs.append(run)
        inside, left = inside + size, left - size
    return runs
