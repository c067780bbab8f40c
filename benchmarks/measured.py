"""One run of one contender: what it is given, and what it took."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.shapes import Shape

MIB = 1 << 20


@dataclass
class Run:
    """What a contender is given. memory: MiB that it may take, where it can be told; device: cpu or cuda."""

    directory: Path
    shape: Shape
    tokens: int = 512
    memory: int | None = None
    device: str = "cpu"
    found: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Measure the block: imports and what is put into memory beforehand do not count, but for the peak.

        found: seconds; cpu_seconds of all threads; disk_read and disk_written, bytes that the system moved for this
        process; peak_mib, its largest resident memory since it began, pages of mapped files included; on a GPU
        peak_device_mib, what torch held there.
        """
        disk, processor, began = _disk(), time.process_time(), time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.found["peak_device_mib"] = torch.cuda.max_memory_allocated() / MIB
        self.found["seconds"] = time.perf_counter() - began
        self.found["cpu_seconds"] = time.process_time() - processor
        self.found |= {name: value - disk[name] for name, value in _disk().items()}
        self.found["peak_mib"] = _peak() / MIB

    def sequences(self) -> list[list[int]]:
        """Random token ids, 128 to a sequence."""
        generator, length = torch.Generator().manual_seed(0), min(128, self.tokens)
        most = self.shape.config["vocab_size"]
        drawn = [torch.randint(most, (length,), generator=generator) for _ in range(self.tokens // length)]
        return [ids.tolist() for ids in drawn]


def _disk() -> dict[str, int]:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"disk_read": int(counters["read_bytes"]), "disk_written": int(counters["write_bytes"])}


def _peak() -> int:
    """Bytes. getrusage counts what the parent held before this program replaced it; this does not."""
    return _kib(Path("/proc/self/status"), "VmHWM:") * 1024


def available_memory() -> int:
    """Bytes that this machine can give to a program that begins now."""
    return _kib(Path("/proc/meminfo"), "MemAvailable:") * 1024


def _kib(path: Path, name: str) -> int:
    return int(next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(name)))
