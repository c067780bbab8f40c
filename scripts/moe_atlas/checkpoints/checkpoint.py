"""A checkpoint directory in the Hub's format as a mapping from tensor names to lazy tensors."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moe_atlas.checkpoints.bin_file import BinFile
from moe_atlas.checkpoints.safetensors_file import SafetensorsFile, TensorInfo
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json

# In the order of preference: a repository that ships both is read as safetensors.
LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Tensors that are read at a time. Measured cold on a cloud disk: 1.0 GB/s with one reader, 1.9 with four.
READERS = 4
Came = Callable[[str, torch.Tensor], None]


def shards_of_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file; a name that leads out of the folder is an AtlasError."""
    shard_of = read_json(path).get("weight_map", {})
    for shard in set(shard_of.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise AtlasError(f"{path}: the shard {shard!r} is not a plain file name; fetch the index again.")
    return shard_of


def main_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """Dtype of the largest tensor; the codes and 8-bit numbers of a quantised checkpoint do not count."""
    tensors = list(tensors)
    plain = [info for info in tensors if info.dtype.is_floating_point and info.dtype.itemsize > 1]
    return max(plain or tensors, key=lambda info: info.stop - info.start).dtype


def open_file(path: Path) -> SafetensorsFile | BinFile:
    """The lazy tensors of one weight file, by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else BinFile(path)


class Checkpoint:
    """Tensors of a directory by name, read on demand and checked to be finite.

    Attributes: directory; files (the weight files in order); tensors (name -> TensorInfo).
    `bytes_read` counts the bytes of all tensors read so far.
    Raises AtlasError: directory or shard missing, no weight files, damaged shard, a tensor the index
    names that its shard lacks, NaN or infinite weights.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise AtlasError(f"{self.directory}: there is no such directory; correct the source of the row.")
        self.bytes_read = 0
        self._file_of: dict[str, SafetensorsFile | BinFile] = {}
        self.files = self._open()

    def _open(self) -> list[Path]:
        for index_name, single_name in LAYOUTS:
            index_path, single_path = self.directory / index_name, self.directory / single_name
            if index_path.exists():
                shard_of = shards_of_index(index_path)
                files = [self.directory / name for name in sorted(set(shard_of.values()))]
                for path in files:
                    if not path.exists():
                        raise AtlasError(f"{path}: this shard is named by {index_name} but missing; fetch it again.")
                shards = {path.name: open_file(path) for path in files}
                for name, shard in shard_of.items():
                    if name not in shards[shard].tensors:
                        raise AtlasError(f"{self.directory / shard}: the tensor {name} is missing; fetch it again.")
                    self._file_of[name] = shards[shard]
                return files
            if single_path.exists():
                file = open_file(single_path)
                self._file_of = dict.fromkeys(file.tensors, file)
                return [single_path]
        names = " or ".join(name for _, name in LAYOUTS)
        raise AtlasError(f"{self.directory}: there are no weights here ({names}); fetch the checkpoint again.")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the index."""
        return list(self._file_of)

    def expect(self, groups: Sequence[Sequence[str]]) -> None:
        """Say in which order groups of tensors will be read. It matters only where files come and go."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, those of a quantised checkpoint's plain tensors."""
        return main_dtype(self.tensors.values())

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in the dtype of its file; NaN or infinity is an AtlasError."""
        return self.read_all([name])[name]

    def read_all(
        self, names: Iterable[str], into: Mapping[str, torch.Tensor] | None = None, came: Came | None = None
    ) -> dict[str, torch.Tensor]:
        """Several tensors by name, each as `read` gives it; those named in `into` are put there, in its dtype.

        came(name, tensor) is called for each as soon as it is there, by the thread that has read it.
        A tensor of another shape than that it is to be put into is an AtlasError.
        """
        return self._read_many([(self._file_of[name], name) for name in names], into or {}, came)

    def _read_many(
        self,
        wanted: Sequence[tuple[SafetensorsFile | BinFile, str]],
        into: Mapping[str, torch.Tensor],
        came: Came | None,
    ) -> dict[str, torch.Tensor]:
        """Tensors by name from their files, several at a time: one reader does not keep a disk busy."""

        def read(pair: tuple[SafetensorsFile | BinFile, str]) -> tuple[str, torch.Tensor]:
            tensor = self._read(*pair, into.get(pair[1]))
            if came is not None:
                came(pair[1], tensor)
            return pair[1], tensor

        with ThreadPoolExecutor(min(READERS, max(1, len(wanted))), "reader") as readers:
            found = dict(readers.map(read, wanted))
        self.bytes_read += sum(file.tensors[name].stop - file.tensors[name].start for file, name in wanted)
        return found

    def _read(self, file: SafetensorsFile | BinFile, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        if into is None:
            return self._finite(file, name, file.read(name))
        info = file.tensors[name]
        if info.shape != into.shape:
            raise AtlasError(
                f"{file.path}: the tensor {name} has the shape {list(info.shape)}, and by config.json "
                f"{list(into.shape)}; fetch both again."
            )
        if info.dtype == into.dtype and into.is_contiguous():
            return self._finite(file, name, file.read(name, into))
        return into.copy_(self._finite(file, name, file.read(name)))

    def _finite(self, file: SafetensorsFile | BinFile, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise AtlasError(f"{file.path}: the tensor {name} holds NaN or infinite weights; fetch or save it again.")
        return tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor of floats is NaN or infinite."""
    # A sum is finite unless a term is not: one pass and no mask of the tensor's size. It is asked for in the tensor's
    # own dtype, since torch makes a converted copy of the tensor for another one. (8-bit floats have no sum.)
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # Finite numbers may add up to more than float16 holds.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
