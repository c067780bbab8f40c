"""One PyTorch .bin file, read without running anything in it."""

import os
import pickle
from pathlib import Path

import torch

from moe_atlas.checkpoints.safetensors_file import TensorInfo
from moe_atlas.errors import AtlasError, first_line

_ZIP = b"PK"  # how the archives of torch 1.6 and later begin


class BinFile:
    """Lazy tensors of one .bin shard, through torch's weights-only unpickler and a memory map.

    A file in the format of torch before 1.6 cannot be mapped: it is held in memory whole.
    Raises AtlasError for a file that holds anything but tensors (it is refused, nothing of it runs),
    for one without names for them, and for one that is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                mapped = file.read(2) == _ZIP
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            raise AtlasError(
                f"{self.path}: the file holds more than tensors and was refused; use safetensors weights of the model."
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise AtlasError(f"{self.path}: the file is damaged ({first_line(error)}); fetch it again.") from None
        if not isinstance(state, dict):
            raise AtlasError(f"{self.path}: the file holds no tensors by name; use safetensors weights of the model.")
        self._state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.dtype.itemsize)
            for name, tensor in self._state.items()
        }

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in the dtype of the file, copied out of the map, its elements in order of its indices."""
        if into is not None:
            return into.copy_(self._state[name])
        return self._state[name].clone(memory_format=torch.contiguous_format)
