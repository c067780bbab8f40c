"""The least that a case takes on this machine: its bytes over the disk's speed, its operations over that of products.

Counted are the products that no method can do without, two operations for a multiplication and an addition:

extraction  all experts on all tokens, T tokens, in the checkpoint's precision: 2 T L N 3 m d. Not attention.
weights     for each of three matrices, in float32: the inner products of N flattened matrices twice, raw and
            standardised, N (N + 1) m d each; the correlations of d coordinates over N m neurons, d (d + 1) N m.
            Symmetric matrices count once. Not conversions, nor eigenvalues.
matching    the cosines of m neurons with m, in float32: 2 m m d. Not the assignment.
pca         the correlations, as above, of one matrix.
reading     nothing.

The speed is that of one product of such a shape, the best of five, with the case's number of threads.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.plan import Case

_BLOCK, _READERS, _ROWS = 16 << 20, 4, 4096


def drop(directory: Path) -> None:
    """Forget the files of a folder, so that the next reader goes to the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(path: Path) -> float:
    """Bytes a second of four readers of 16 MiB blocks."""
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    began = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(lambda start: len(os.pread(descriptor, _BLOCK, start)), range(0, size, _BLOCK)))
    os.close(descriptor)
    return size / (time.perf_counter() - began)


def disk_speed(directory: Path) -> float:
    """Bytes a second on the largest file, cold."""
    drop(directory)
    return read(max(directory.iterdir(), key=lambda path: path.stat().st_size))


def matrix_speed(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of one product of (rows, inner) with the transpose of (columns, inner)."""
    left, right = (torch.randn(size, inner).to(device, dtype) for size in (rows, columns))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * rows * inner * columns / min(times[1:])


def needed(case: Case, total: int) -> int:
    """Bytes of the weights that a case reads while the clock runs; total: those of its checkpoint, in bfloat16."""
    if case.suite == "weights":
        return sum(2 * torch.Size(size).numel() for size in case.sizes().layer(0).values())
    return total if case.suite in ("extraction", "reading") else 0


def operations(case: Case) -> int:
    shape = case.sizes()
    n, m, d = shape.experts, shape.neurons, shape.width
    return {
        "extraction": 2 * case.tokens * case.layers * n * 3 * m * d,
        "reading": 0,
        "weights": 3 * (2 * n * (n + 1) * m * d + d * (d + 1) * n * m),
        "matching": 2 * m * m * d,
        "pca": d * (d + 1) * n * m,
    }[case.suite]


def floors(case: Case, directory: Path, total: int, device: str = "cpu") -> dict[str, float]:
    """floor_disk and floor_arithmetic in seconds, measured now."""
    shape, count, wanted = case.sizes(), operations(case), needed(case, total)
    neurons = min(shape.neurons * (1 if case.suite == "matching" else shape.experts), _ROWS)
    sizes = {
        "extraction": (case.tokens, shape.width, shape.neurons),
        "matching": (neurons, shape.width, neurons),
    }.get(case.suite, (shape.width, neurons, shape.width))
    dtype, own = (torch.bfloat16 if case.suite == "extraction" else torch.float32), torch.get_num_threads()
    torch.set_num_threads(case.threads or own)
    arithmetic = count / matrix_speed(*sizes, dtype, device) if count else 0.0
    torch.set_num_threads(own)
    return {"floor_disk": wanted / disk_speed(directory) if wanted else 0.0, "floor_arithmetic": arithmetic}
