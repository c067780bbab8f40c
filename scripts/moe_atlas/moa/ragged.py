"""Sequences of token ids of different lengths behind one another, in memory or in a file that is not read whole."""

import contextlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DONE = "done.json"  # beside sequences in files, written last: while it is there, they are whole


@dataclass(frozen=True)
class Ragged:
    """ids: all sequences behind one another, an unsigned integer array that may be a file mapped into memory.

    offsets: (sequences + 1,) int64, where each begins in ids, and where the last ends.
    """

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, (sequences,) int64."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """The same sequences in memory."""
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        return cls(np.fromiter((i for ids in sequences for i in ids), np.uint32, int(offsets[-1])), offsets)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Ragged":
        """What `write_ragged` has written under this name; the ids stay in the file."""
        offsets = np.load(folder / f"{name}.offsets.npy")
        path = folder / f"{name}.ids.bin"
        if not offsets[-1]:
            return cls(np.empty(0, np.uint32), offsets)
        return cls(np.memmap(path, np.uint32, "r", shape=(int(offsets[-1]),)), offsets)


def write_ragged(
    folder: Path, names: Sequence[str], rows: Iterable[Sequence[Sequence[int]]]
) -> tuple[int, tuple[int, ...]]:
    """Write rows of one sequence for each name as they come, 4 bytes a token; return rows, and tokens of each name.

    Offsets are written last: where they are missing, the ids are not whole.
    """
    for name in names:
        (folder / f"{name}.offsets.npy").unlink(missing_ok=True)
    ends = [array("q", [0]) for _ in names]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}.ids.bin").open("wb")) for name in names]
        for row in rows:
            for file, end, ids in zip(files, ends, row, strict=True):
                file.write(np.asarray(ids, np.uint32).tobytes())
                end.append(end[-1] + len(ids))
    for name, end in zip(names, ends, strict=True):
        np.save(folder / f"{name}.offsets.npy", np.asarray(end, np.int64))
    return len(ends[0]) - 1, tuple(end[-1] for end in ends)


def batches_by_length(
    lengths: np.ndarray, rng: np.random.Generator | None, sentences: int, tokens: int = 0
) -> Iterator[np.ndarray]:
    """Places of all sequences, in batches of sequences of about one length.

    lengths: (n,), sequences of equal length in an order that `rng` draws, which the batches are shuffled by too; None:
    nothing is shuffled. A batch has at most `sentences` sequences, 0 for any number, and with `tokens` at most so many
    tokens, padding included; a sequence that is longer is a batch of its own.
    """
    order = rng.permutation(len(lengths)) if rng is not None else np.arange(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    sizes, cuts, start = lengths[order], [0], 0
    while start < len(order):
        end = min(start + (sentences or len(order)), len(order))
        if tokens:
            end = min(end, start + max(1, tokens // max(1, int(sizes[start]))))
            while end > start + 1 and (end - start) * sizes[end - 1] > tokens:
                end -= 1
        cuts.append(end)
        start = end
    places = range(len(cuts) - 1) if rng is None else rng.permutation(len(cuts) - 1)
    for place in places:
        yield order[cuts[place] : cuts[place + 1]]
