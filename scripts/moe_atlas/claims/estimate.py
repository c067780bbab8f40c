"""What goes into an estimator and what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True)
class Evidence:
    """What is known of one model, and of one text where the claim is about what experts do on text.

    tables: by name, rows of that model and text, site ffn only. sizes: checkpoint.json (d hidden width, m expert
    width). direction: "greater" or "less", the claimed side of the null. parameters: of the claim's row.
    """

    tables: Mapping[str, pl.DataFrame]
    sizes: Mapping[str, int]
    direction: str
    parameters: Mapping[str, float]
    generator: np.random.Generator

    @property
    def sign(self) -> int:
        """1 where the claim is that the value is greater than the null, -1 where less."""
        return 1 if self.direction == "greater" else -1


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (95 %), its value under the null, and a one-sided p in the claimed direction.

    n: how many units p is over (pairs, layers, experts or tokens; the estimator says which). smallest_p: the least p
    that the test can give on data of this size.
    """

    value: float
    low: float
    high: float
    null: float
    p: float
    n: int
    smallest_p: float = 0.0


class NotEnough(Exception):
    """The tables do not hold what the estimator needs; the text says what is missing, as the reason of a verdict."""
