"""Intervals over documents: statistics of counts by block, recomputed for blocks drawn with replacement."""

import math
from collections.abc import Callable

import numpy as np

DRAWS = 1000
FEWEST_BLOCKS = 5  # below, there is no interval
LEVEL = 0.95
_NUMBERS = 1 << 22  # float64 numbers of resampled counts held at once: 32 MiB

Statistic = Callable[[np.ndarray], np.ndarray]


def block_weights(blocks: int, generator: np.random.Generator) -> np.ndarray:
    """How often each block counts, (R, B) float64: once for the value itself, then as drawn with replacement.

    R = 1 + DRAWS, or 1 where there are fewer than FEWEST_BLOCKS blocks.
    """
    once = np.ones((1, blocks))
    if blocks < FEWEST_BLOCKS:
        return once
    drawn = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=DRAWS)
    return np.concatenate([once, drawn])


class Weights:
    """block_weights by number of blocks, drawn once: the measures of a layer are compared on the same resamples."""

    def __init__(self, generator: np.random.Generator):
        self._generator = generator
        self._drawn: dict[int, np.ndarray] = {}

    def __call__(self, blocks: int) -> np.ndarray:
        if blocks not in self._drawn:
            self._drawn[blocks] = block_weights(blocks, self._generator)
        return self._drawn[blocks]


def resample(statistic: Statistic, weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`statistic` of the weighted sums of `counts` over blocks.

    counts: (B, ...); statistic maps (r, ...) to (r, ...) of any further shape. Returns (R, ...) float64.
    """
    inner = counts.shape[1:]  # a text without frequent token types has an axis of length 0
    flat = counts.reshape(len(counts), math.prod(inner)).astype(np.float64)
    step = max(1, _NUMBERS // max(flat.shape[1], 1))
    sums = ((weights[first : first + step] @ flat) for first in range(0, len(weights), step))
    return np.concatenate([statistic(part.reshape(len(part), *inner)) for part in sums])


def interval(values: np.ndarray, least: float = -np.inf, most: float = np.inf) -> tuple[np.ndarray, ...]:
    """(value, low, high) of resampled values (R, ...): the first, and the 95 % percentile interval of the others.

    Drawing blocks twice makes such statistics as a largest share larger, as fewer tokens do. So the draws are moved
    until their mean is the value: the interval is one for a text of this size, like the chance level beside it.
    least, most: what the statistic cannot pass. low and high are NaN where there are no draws.
    """
    value, draws = values[0], values[1:]
    if not len(draws):
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0) + (value - draws.mean(0))
    return value, np.clip(low, least, most), np.clip(high, least, most)
