"""Keep a text's tensors in bounded memory: equal ones once, and what does not fit in a file without a name."""

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from moe_atlas.errors import AtlasError

# What hidden states may take of the memory of the device they are on.
MEMORY_BYTES = {"cpu": 16 << 20, "cuda": 4 << 30}


class Spill:
    """Tensors by number. Those that are put when `in_memory` bytes are full go to a file, and come back when asked for.

    The file is made in `directory` (by default the system's) when it is first needed, and has no name there, so that
    nothing stays however the program ends. It is read and written, and not mapped: mapped pages count as memory.
    Raises AtlasError where the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike | None, in_memory: int):
        self.directory, self.in_memory = directory, in_memory
        self.kept: dict[int, torch.Tensor] = {}
        self.places: dict[int, tuple[int, int]] = {}  # offset in the file, bytes reserved
        self.forms: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self._file = None
        self._used = self._end = 0

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Keep a tensor; it takes the place of an earlier one of the same number."""
        if number not in self.places and (number in self.kept or self._used + tensor.nbytes <= self.in_memory):
            self._used += tensor.nbytes - (self.kept[number].nbytes if number in self.kept else 0)
            self.kept[number] = tensor
            return
        if tensor.nbytes > self.places.get(number, (0, -1))[1]:
            self.places[number] = self._end, tensor.nbytes
            self._end += tensor.nbytes
        self.forms[number] = tensor.shape, tensor.dtype, tensor.device
        try:
            self._transfer(os.pwrite, tensor.cpu(), self.places[number][0])
        except OSError as error:
            raise AtlasError(
                f"{self.directory or tempfile.gettempdir()}: hidden states of {self._end} bytes cannot be kept there "
                f"({error}); free as much, or shorten the corpus."
            ) from None

    def get(self, number: int) -> torch.Tensor:
        """The tensor of this number."""
        if number in self.kept:
            return self.kept[number]
        shape, dtype, device = self.forms[number]
        tensor = torch.empty(shape, dtype=dtype)
        self._transfer(lambda file, part, place: os.preadv(file, [part], place), tensor, self.places[number][0])
        return tensor.to(device)

    def _transfer(self, call, tensor: torch.Tensor, offset: int) -> None:
        """Read or write all bytes of a tensor; one call may take fewer than it is given."""
        if self._file is None:
            if self.directory is not None:
                Path(self.directory).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115 - lives as long as this
        part = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
        while part:
            done = call(self._file.fileno(), part, offset)
            if done == 0:
                raise OSError("the file ends too early")
            part, offset = part[done:], offset + done


class Interned:
    """Give back the tensor that was seen first for every equal one, within tuples, lists and dicts too."""

    def __init__(self):
        self._known: dict[tuple, list[torch.Tensor]] = defaultdict(list)

    def __call__(self, value):
        if isinstance(value, torch.Tensor):
            known = self._known[value.shape, value.stride(), value.dtype, value.device]
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            known.append(value)
            return value
        if type(value) is dict:
            return {key: self(part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(part) for part in value)
        return value
