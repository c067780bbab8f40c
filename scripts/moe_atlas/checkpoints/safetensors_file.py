"""One .safetensors file: the header is checked before a tensor is believed, tensors are read on demand.

Reading is `pread` into memory of its own: no memory map stays open, so what a layer used is given
back when the layer is freed, and resident memory is what the program holds.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_atlas.errors import AtlasError

# Names of the format (safetensors README, "Format").
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100 << 20  # the limit of the format's own reader


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype, shape, and its byte range in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """Lazy tensors of one file.

    Raises AtlasError (one sentence naming the file) for a file that is truncated, has a header that
    is not JSON, a tensor whose bytes do not fit its shape, or a range outside the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.tensors = self._header()

    def _damaged(self, what: str) -> AtlasError:
        return AtlasError(f"{self.path}: {what}; fetch or save this file again.")

    def _header(self) -> dict[str, TensorInfo]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise self._damaged(f"the file is truncated or no safetensors file ({size} bytes)")
            try:
                header = json.loads(file.read(length))
            except (UnicodeDecodeError, json.JSONDecodeError):
                raise self._damaged("the safetensors header cannot be read") from None
        data = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                start, stop = entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise self._damaged(f"the header entry of {name} is not understood") from None
            if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise self._damaged(f"the bytes of {name} do not fit its shape {list(shape)}")
            if data + stop > size:
                raise self._damaged(f"the file is truncated: {name} ends at byte {data + stop} of {size}")
            tensors[name] = TensorInfo(dtype, shape, data + start, data + stop)
        return tensors

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in the dtype of the file, in fresh memory on the CPU; or read `into` one that has its form."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype) if into is None else into
        view, done = memoryview(tensor.flatten().view(torch.uint8).numpy()), 0
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], info.start + done)
                if count == 0:
                    raise self._damaged(f"the file ends within {name}")
                done += count
        finally:
            os.close(descriptor)
        return tensor
