"""A checkpoint larger than the disk: shards come when they are asked for and go when nobody will ask again."""

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from moe_atlas.checkpoints.bin_file import BinFile
from moe_atlas.checkpoints.checkpoint import Came, Checkpoint, main_dtype, open_file
from moe_atlas.checkpoints.safetensors_file import SafetensorsFile
from moe_atlas.errors import AtlasError

MAX_SHARDS = 3  # a layer may straddle two shards while the next one is fetched


class ShardSource(Protocol):
    """Where shards come from and go to."""

    def fetch(self, shard: str) -> Path:
        """Path of the shard on disk, complete and checked; fetched if it is not there."""

    def delete(self, shard: str) -> None:
        """Take the shard off the disk."""

    def on_disk(self) -> list[str]:
        """Shards that lie there already."""


class FetchedCheckpoint(Checkpoint):
    """The tensors of a checkpoint by name, of which at most `limit` shards lie on disk at any time.

    directory: where config.json and the tokenizer lie. shard_of: tensor name -> shard. `expect` must be called before
    the first read: it says in which order the tensors are wanted, and a shard is deleted once the last group that needs
    it has been read. A shard that has to make room before that, which happens when a layer's tensors are spread over
    more than `limit` shards, is fetched again.

    Attributes: fetched, the shards in the order in which they came; most, the largest number on disk at a time.
    Raises AtlasError: a shard lacks a tensor that the index gives it, NaN or infinite weights, what the source raises.
    """

    def __init__(
        self, directory: str | os.PathLike, shard_of: Mapping[str, str], source: ShardSource, limit: int = MAX_SHARDS
    ):
        self.directory = Path(directory)
        self.bytes_read = 0
        self.fetched: list[str] = []
        self._shard_of, self._source, self._limit = dict(shard_of), source, limit
        # None: on disk since an earlier run, not opened yet.
        self._files: dict[str, SafetensorsFile | BinFile | None] = dict.fromkeys(source.on_disk())
        self.most = len(self._files)
        self._group_of: dict[str, int] = {}
        self._uses: dict[str, set[int]] = {shard: set() for shard in self._shard_of.values()}
        self._dtype: torch.dtype | None = None
        self._lock = threading.Lock()  # the layer read ahead and what lies outside the layers

    @property
    def names(self) -> list[str]:
        return list(self._shard_of)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the largest tensor in the first shard that comes."""
        if self._dtype is None:
            with self._lock:
                self._file(next(iter(self._shard_of.values())), group=0)
        return self._dtype

    def expect(self, groups: Sequence[Sequence[str]]) -> None:
        for number, names in enumerate(groups):
            for name in names:
                self._group_of[name] = number
                self._uses[self._shard_of[name]].add(number)

    def read_all(
        self, names: Iterable[str], into: Mapping[str, torch.Tensor] | None = None, came: Came | None = None
    ) -> dict[str, torch.Tensor]:
        names = list(names)
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._shard_of[name], []).append(name)
        found = {}
        with self._lock:
            # Those on disk first: they may go, and make room for the others.
            for shard in sorted(wanted, key=lambda shard: shard not in self._files):
                group = max(self._group_of.get(name, -1) for name in wanted[shard])
                file = self._file(shard, group)
                for name in wanted[shard]:
                    if name not in file.tensors:
                        raise AtlasError(
                            f"{file.path}: the tensor {name} is missing; the index belongs to other shards."
                        )
                found |= self._read_many([(file, name) for name in wanted[shard]], into or {}, came)
                if self._next_use(shard, group) == math.inf:
                    self._delete(shard)
        return {name: found[name] for name in names}

    def _next_use(self, shard: str, group: int) -> float:
        """The first group after `group` that needs the shard, infinity if none does."""
        return min((use for use in self._uses.get(shard, ()) if use > group), default=math.inf)

    def _file(self, shard: str, group: int) -> SafetensorsFile | BinFile:
        """The open shard; where the disk may hold no more, the one needed latest makes room."""
        if shard not in self._files:
            while len(self._files) >= self._limit:
                self._delete(max(self._files, key=lambda held: self._next_use(held, group)))
            self.fetched.append(shard)
            self.most = max(self.most, len(self._files) + 1)
            self._files[shard] = None
        if self._files[shard] is None:
            self._files[shard] = file = open_file(self._source.fetch(shard))
            if self._dtype is None:
                self._dtype = main_dtype(file.tensors.values())
        return self._files[shard]

    def _delete(self, shard: str) -> None:
        # The object goes first: a .bin file is mapped into memory, and a mapped file keeps its place on the disk.
        del self._files[shard]
        self._source.delete(shard)

    def close(self) -> None:
        """Delete every shard that is still there."""
        with self._lock:
            for shard in list(self._files):
                self._delete(shard)
