"""Time contenders side by side on checkpoints with the true shapes of published models, and print ratios.

Contenders take turns, so that a machine that slows down slows all of them. Cold: the files are dropped from the page
cache before each run. Beside the times stand two floors of this machine, measured in the same run: the bytes over the
disk's speed, and the operations over the speed of matrix products in the checkpoint's precision. transformers needs
accelerate to leave layers on disk: pip install accelerate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import synthetic
import torch
from contenders import CONTENDERS

HERE = Path(__file__).resolve().parent
EXTRACTION = ("extraction_atlas", "extraction_transformers_disk")


def drop(directory: Path) -> None:
    """Forget the files of a folder, so that the next reader goes to the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_speed(directory: Path) -> float:
    """Bytes a second of four readers of 16 MiB blocks on the largest file, cold."""
    from concurrent.futures import ThreadPoolExecutor

    path, block = max(directory.iterdir(), key=lambda path: path.stat().st_size), 16 << 20
    drop(directory)
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as readers:
        list(readers.map(lambda start: len(os.pread(descriptor, block, start)), range(0, size, block)))
    os.close(descriptor)
    return size / (time.perf_counter() - began)


def matrix_speed(tokens: int, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of one product of `tokens` rows with a matrix of an expert's shape; the best of five."""
    weight, rows = torch.randn(shape).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        times.append(time.perf_counter() - began)
    return 2 * tokens * weight.numel() / min(times[1:])


def floors(shape: synthetic.Shape, directory: Path, total: int, tokens: int) -> dict[str, float]:
    """Seconds that reading the layers, and all experts on all tokens, take at least."""
    matrices = [torch.Size(size).numel() for size in shape.expert.values()]
    operations = 2 * tokens * shape.layers * shape.experts * sum(matrices)
    largest = max(shape.expert.values(), key=lambda size: size[0])
    return {"disk": total / disk_speed(directory), "arithmetic": operations / matrix_speed(tokens, largest)}


def measure(contender: str, directory: Path, options: list[str], cold: bool) -> dict:
    """One run of a contender; an AtlasError or a crash is kept as its last line."""
    if cold:
        drop(directory)
    command = [sys.executable, HERE / "contenders.py", contender, directory, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": lines[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mixtral-8x7b", choices=synthetic.SHAPES)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=EXTRACTION, choices=CONTENDERS)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--memory", type=int, help="MiB that contenders may take, where they can be told")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--checkpoints", type=Path, default=Path("results/benchmarks/checkpoints"))
    parser.add_argument("--output", type=Path, help="parquet file for the numbers")
    arguments = parser.parse_args()

    shape = synthetic.SHAPES[arguments.shape](arguments.layers)
    directory = arguments.checkpoints / f"{arguments.shape}-{arguments.layers}"
    total = synthetic.write(shape, directory)
    options = ["--tokens", arguments.tokens, "--threads", torch.get_num_threads()]
    options += ["--memory", arguments.memory] if arguments.memory else []
    least, runs = floors(shape, directory, total, arguments.tokens), []
    print(f"{directory.name}: {total / 1e9:.2f} GB; floors: " + ", ".join(f"{k} {v:.1f} s" for k, v in least.items()))
    for repeat in range(arguments.repeats):
        for contender in arguments.contenders:
            found = measure(contender, directory, options, not arguments.warm)
            print(f"  {repeat} {contender}: {found}", flush=True)
            fixed = {"shape": arguments.shape, "layers": arguments.layers, "tokens": arguments.tokens, "repeat": repeat}
            fixed |= {"contender": contender, "cold": not arguments.warm, "bytes": total}
            runs.append(fixed | found | {f"floor_{name}": seconds for name, seconds in least.items()})
    frame = pl.DataFrame(runs, infer_schema_length=None)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(arguments.output)
    summary(frame, least)


def summary(frame: pl.DataFrame, least: dict[str, float]) -> None:
    """Medians, ratios to the first contender, and how far it is from the larger floor."""
    if "seconds" not in frame.columns:
        return
    first = frame["contender"][0]
    medians = {
        name: {column: statistics.median(part[column].drop_nulls()) for column in ("seconds", "peak_mib", "disk_read")}
        for (name,), part in frame.drop_nulls("seconds").group_by("contender", maintain_order=True)
    }
    for name, found in medians.items():
        ratio, over = (found["seconds"] / other for other in (medians[first]["seconds"], max(least.values())))
        read = found["disk_read"] / frame["bytes"][0]
        print(
            f"{name}: {found['seconds']:.1f} s ({ratio:.2f} of {first}, {over:.2f} of the larger floor), "
            f"{found['peak_mib']:,.0f} MiB, {read:.2f} of the bytes read"
        )


if __name__ == "__main__":
    main()
