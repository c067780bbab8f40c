"""A promise of memory: how much of a checkpoint may be held at a time, or a sentence before the work begins."""

import resource
import sys
from dataclasses import dataclass

from moe_atlas.errors import AtlasError

MIB = 1 << 20
# What evaluating all experts on a chunk of tokens, and the statistics of it, may take besides the weights.
WORK = 640 * MIB
# Libraries load more of themselves when they are first used.
LATER = 96 * MIB


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Budget:
    """What a run may hold. memory: bytes, None without a bound; reserved: bytes of what it keeps until its end."""

    memory: int | None = None
    reserved: int = 0

    def less(self, reserved: int) -> "Budget":
        """The same with so many bytes more kept for something else."""
        return Budget(self.memory, self.reserved + reserved)

    def reads_ahead(self, layers: list[int], outside: int, what: str) -> bool:
        """Whether the next layer may be read while one is at work. layers, outside: bytes of them in memory.

        Raises AtlasError when not even one layer fits: it says what would do.
        """
        if self.memory is None:
            return True
        fixed = peak() + LATER + WORK + outside + self.reserved
        both = max((first + second for first, second in zip(layers, layers[1:], strict=False)), default=0)
        if fixed + both <= self.memory:
            return True
        least = fixed + max(layers, default=0)
        if least <= self.memory:
            return False
        raise AtlasError(
            f"{what}: a run of it holds {-(-least // MIB):,} MiB at least, {-(-max(layers) // MIB):,} of them for its "
            f"largest layer, and may take {self.memory // MIB:,}; raise mem_mb in its row."
        )
