"""One PyTorch .bin file, read without running anything in it."""

import os
import pickle
from pathlib import Path

import torch

from moe_atlas.checkpoints.safetensors_file import TensorInfo
from moe_atlas.errors import AtlasError, first_line


class BinFile:
    """Lazy tensors of one .bin shard, through torch's weights-only unpickler and a memory map.

    Raises AtlasError for a file that holds anything but tensors (it is refused, nothing of it runs)
    and for one that is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise AtlasError(
                f"{self.path}: the file holds more than tensors and was refused; use safetensors weights of the model."
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise AtlasError(f"{self.path}: the file is damaged ({first_line(error)}); fetch it again.") from None
        self._state = {name: tensor for name, tensor in self._state.items() if isinstance(tensor, torch.Tensor)}
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.dtype.itemsize)
            for name, tensor in self._state.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype of the file, copied out of the map."""
        return self._state[name].clone()
