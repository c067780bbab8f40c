"""What is measured: a shape, which contenders, how often; and where their results are kept."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import polars as pl

from benchmarks.shapes import SHAPES, Shape

SUITES = {
    "extraction": ("atlas", "transformers_disk", "transformers_memory", "airllm"),
    "reading": ("atlas", "safetensors"),
    "weights": ("atlas", "paper"),
    "matching": ("atlas", "scipy", "paper"),
    "pca": ("atlas", "sklearn", "sklearn_covariance"),
}
# Those that can be told to use a GPU.
ON_GPU = {
    *("extraction_atlas", "extraction_transformers_disk", "extraction_transformers_memory", "extraction_airllm"),
    *("matching_atlas", "matching_scipy", "matching_paper", "pca_atlas"),
}


@dataclass(frozen=True)
class Case:
    """Contenders of one suite on one shape. cold, warm: runs of each with the files out of and in the page cache.

    threads: 0 takes as many as torch does. memory: MiB that contenders may take, where they can be told; 0 tells none.
    """

    suite: str
    shape: str
    layers: int = 1
    tokens: int = 0
    threads: int = 0
    memory: int = 0
    shrink: int = 1
    cold: int = 1
    warm: int = 1
    contenders: tuple[str, ...] = ()

    def names(self, device: str = "cpu") -> list[str]:
        """The contenders, ours first; for cuda those that can use it."""
        names = [name for name in SUITES[self.suite] if not self.contenders or name in self.contenders]
        return [name for name in names if device == "cpu" or f"{self.suite}_{name}" in ON_GPU]

    @property
    def rounds(self) -> list[tuple[int, bool]]:
        """(number, whether cold) of each round, in their order."""
        rounds = product(range(max(self.cold, self.warm)), (True, False))
        return [(number, cold) for number, cold in rounds if number < (self.cold if cold else self.warm)]

    @property
    def checkpoint(self) -> str:
        """Name of the folder of its checkpoint."""
        return f"{self.shape}-{self.layers}" + (f"-shrunk-{self.shrink}" if self.shrink > 1 else "")

    def sizes(self) -> Shape:
        return SHAPES[self.shape](self.layers, self.shrink)


MIXTRAL, OLMOE, TOKENS = "mixtral-8x7b", "olmoe", 512
SMALL = {"shape": MIXTRAL, "layers": 2, "shrink": 8}
PLANS = {
    # Seconds each: whether everything runs.
    "quick": (
        Case("extraction", **SMALL, tokens=256),
        Case("reading", **SMALL),
        Case("weights", **SMALL),
        Case("matching", **SMALL, cold=0, threads=1),
        Case("pca", **SMALL, cold=0),
    ),
    # About 20 minutes on two cores.
    "default": (
        Case("weights", OLMOE, 1, cold=1, warm=0),
        Case("matching", OLMOE, 1, cold=0, warm=3, threads=1),
        Case("pca", OLMOE, 1, cold=0, warm=1),
        Case("reading", MIXTRAL, 3, cold=3, warm=3),
        Case("matching", MIXTRAL, 3, cold=0, warm=1, threads=1, contenders=("atlas", "scipy")),
        Case("extraction", MIXTRAL, 3, TOKENS, cold=3, warm=1),
    ),
    # Hours: what the paper's method takes at Mixtral's shape, and the largest layers.
    "full": (
        Case("extraction", "deepseek", 2, TOKENS, cold=3, warm=3, contenders=("atlas",)),
        Case("extraction", OLMOE, 2, TOKENS, cold=3, warm=3),
        Case("weights", "deepseek", 2, cold=3, warm=0),
        Case("weights", MIXTRAL, 3, cold=3, warm=0),
        Case("pca", MIXTRAL, 3, cold=0, warm=3),
        Case("matching", MIXTRAL, 3, cold=0, warm=3, threads=1, contenders=("atlas", "scipy")),
        Case("reading", MIXTRAL, 3, cold=5, warm=5),
        Case("extraction", MIXTRAL, 3, TOKENS, cold=5, warm=3),
        Case("extraction", "mixtral-8x22b", 2, TOKENS, memory=12000, cold=3, warm=0, contenders=("atlas",)),
        Case("extraction", "grok-1", 1, TOKENS, memory=16000, cold=3, warm=0, contenders=("atlas",)),
    ),
}

# What tells one case of one machine from another in the tables.
KEYS = ("suite", "shape", "shrink", "layers", "tokens", "threads", "memory", "device", "cpu")
SCHEMA = {
    "suite": pl.String,
    "shape": pl.String,
    "shrink": pl.Int64,  # what every size of the shape is divided by
    "layers": pl.Int64,
    "tokens": pl.Int64,
    "threads": pl.Int64,
    "memory": pl.Int64,  # MiB that contenders were told; 0 none
    "device": pl.String,  # cpu, or the name of the GPU
    "cpu": pl.String,
    "cores": pl.Int64,
    "torch": pl.String,
    "began": pl.String,  # when the case began, UTC
    "contender": pl.String,
    "cold": pl.Boolean,
    "repeat": pl.Int64,
    "seconds": pl.Float64,
    "cpu_seconds": pl.Float64,
    "peak_mib": pl.Float64,  # largest resident memory, pages of mapped files included
    "peak_device_mib": pl.Float64,
    "bytes": pl.Int64,  # of the weights that have to be read; 0 where they are in memory
    "weights_read": pl.Float64,  # over bytes, where the contender counts
    "disk_read": pl.Int64,  # bytes
    "disk_written": pl.Int64,
    "floor_disk": pl.Float64,  # seconds
    "floor_arithmetic": pl.Float64,
    "failed": pl.String,  # its last words
}


def merge(path: Path, frame: pl.DataFrame) -> None:
    """Put one case's rows (SCHEMA) into a suite's file, in the place of what it has of the same case and machine."""
    from moe_atlas.files import atomic_path

    if path.exists():
        frame = pl.concat([pl.read_parquet(path).join(frame, on=KEYS, how="anti"), frame])
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary)
