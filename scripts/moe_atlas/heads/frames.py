"""Rows of the tables of attention experts, and what their numbers share."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.architectures.attention_experts import RoutedExperts
from moe_atlas.behavioral.resampling import interval

Row = dict[str, object]
TAIL = (0.025, 0.975)


def frame(name: str, rows: Sequence[Row], **fields: object) -> pl.DataFrame:
    """Rows as the table `name`; columns that a row lacks are null, and what is not a number is null too."""
    schema = tables.declared(name).schema
    full = [dict.fromkeys(schema) | fields | row for row in rows]
    return pl.DataFrame(full, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))


def place(experts: RoutedExperts) -> Row:
    """Columns that say which experts a row is of."""
    return {"site": experts.site, "kind": experts.kind, "layer": experts.layer}


def drawn(values: np.ndarray, least: float = -np.inf, most: float = np.inf) -> Row:
    """value, low and high of resampled values (R,), the first of them the value itself."""
    value, low, high = interval(values, least, most)
    return {"value": float(value), "low": float(low), "high": float(high)}


def null(values: np.ndarray) -> Row:
    """chance, chance_low and chance_high of values drawn under chance: their mean, and what holds 95 % of them."""
    if not len(values) or np.isnan(values).all():
        return {}
    low, high = np.nanquantile(values, TAIL)
    return {"chance": float(np.nanmean(values)), "chance_low": float(low), "chance_high": float(high)}


def p_value(value: float, nulls: np.ndarray) -> float | None:
    """Share of values drawn under chance that reach the value, itself counted; None where it is not a number."""
    if not np.isfinite(value):
        return None
    return float((1 + (nulls >= value - 1e-12 * abs(value)).sum()) / (1 + len(nulls)))
