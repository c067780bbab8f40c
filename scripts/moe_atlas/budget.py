"""A promise of memory: how much of a checkpoint may be held at a time, or a sentence before the work begins."""

import contextlib
import resource
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from moe_atlas.errors import AtlasError

MIB = 1 << 20
# What evaluating all experts on a chunk of tokens, and the statistics of it, may take besides the weights.
WORK = 640 * MIB
# Libraries load more of themselves when they are first used.
LATER = 96 * MIB


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    with contextlib.suppress(FileNotFoundError):
        # getrusage tells of the program that has started this one, too, where that was larger.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class Held(Enum):
    """What of the layers is in memory at a time."""

    LAYERS = "a layer and what has been read of the next one"
    LAYER = "one layer"
    EXPERTS = "two experts of a layer"


@dataclass(frozen=True)
class Sizes:
    """Bytes in memory. ahead: of a layer while the next one is read, at most; layers: of each layer; by_expert: of each
    layer with two of its experts; outside: of what is in no layer."""

    ahead: int
    layers: list[int]
    by_expert: list[int]
    outside: int


@dataclass(frozen=True)
class Budget:
    """What a run may hold. memory: bytes, None without a bound; reserved: bytes of what it keeps until its end."""

    memory: int | None = None
    reserved: int = 0

    def less(self, reserved: int) -> "Budget":
        """The same with so many bytes more kept for something else."""
        return Budget(self.memory, self.reserved + reserved)

    def holds(self, sizes: Sizes, what: str) -> Held:
        """How much may be in memory at a time; AtlasError when not even two experts fit: it says what would do."""
        fixed = peak() + LATER + WORK + sizes.outside + self.reserved
        layer, least = (max(found, default=0) for found in (sizes.layers, sizes.by_expert))
        for held, size in ((Held.LAYERS, sizes.ahead), (Held.LAYER, layer), (Held.EXPERTS, least)):
            if fixed + size <= self.memory:
                return held
        raise AtlasError(
            f"{what}: a run of it holds {-(-(fixed + least) // MIB):,} MiB at least, {-(-least // MIB):,} of them for "
            f"its largest layer, and may take {self.memory // MIB:,}; raise mem_mb in its row."
        )
