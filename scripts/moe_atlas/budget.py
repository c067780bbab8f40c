"""A promise of memory: how much of a checkpoint may be held at a time, or a sentence before the work begins."""

import resource
import sys
from dataclasses import dataclass
from enum import Enum

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


class Held(Enum):
    """What of the layers is in memory at a time."""

    LAYERS = "a layer and the next one"
    LAYER = "one layer"
    EXPERTS = "two experts of a layer"


@dataclass(frozen=True)
class Budget:
    """What a run may hold. memory: bytes, None without a bound; reserved: bytes of what it keeps until its end."""

    memory: int | None = None
    reserved: int = 0

    def less(self, reserved: int) -> "Budget":
        """The same with so many bytes more kept for something else."""
        return Budget(self.memory, self.reserved + reserved)

    def holds(self, layers: list[int], by_expert: list[int], outside: int, what: str) -> Held:
        """How much may be in memory at a time.

        layers: bytes of each layer in memory; by_expert: the same with two of its experts; outside: of all the rest.
        Raises AtlasError when not even two experts fit: it says what would do.
        """
        if self.memory is None:
            return Held.LAYERS
        fixed = peak() + LATER + WORK + outside + self.reserved
        both = max((first + second for first, second in zip(layers, layers[1:], strict=False)), default=0)
        least = max(by_expert, default=0)
        for held, size in ((Held.LAYERS, both), (Held.LAYER, max(layers, default=0)), (Held.EXPERTS, least)):
            if fixed + size <= self.memory:
                return held
        raise AtlasError(
            f"{what}: a run of it holds {-(-(fixed + least) // MIB):,} MiB at least, {-(-least // MIB):,} of them for "
            f"its largest layer, and may take {self.memory // MIB:,}; raise mem_mb in its row."
        )
