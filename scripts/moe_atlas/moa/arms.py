"""Arms by themselves: the mean over seeds of each test, with Student's interval."""

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.tuning.differences import paired

_MEASURED = ["objective", "arm", "test", "metric"]
_TAKEN = {"seed", "learning_rate", "chosen", "value", "count", "tokens", "steps", "plateau", "study"}


def arms(runs: pl.DataFrame) -> pl.DataFrame:
    """The table moa_arms of the table moa_runs; an arm that several studies have is there once.

    The mean of perplexities is that of their logarithms, the losses, and so is its interval.
    """
    tested = runs.filter(pl.col("test") != "validation", pl.col("chosen"))
    tested = tested.unique([*_MEASURED, "seed"], keep="first", maintain_order=True)
    rows = []
    for keys, group in tested.group_by(_MEASURED, maintain_order=True):
        logarithmic = keys[3] == "perplexity"
        values = group["value"].to_numpy()
        values = np.log(values) if logarithmic else values
        found = dict(zip(("value", "low", "high"), (values.mean(), *paired(values)[:2]), strict=True))
        back = {key: float(np.exp(x) if logarithmic else x) for key, x in found.items() if x is not None}
        shared = {key: group[key][0] for key in group.columns if key not in _TAKEN}
        own = {"seeds": len(group), "plateaus": int(group["plateau"].sum()), "steps": float(group["steps"].mean())}
        rows.append(dict.fromkeys(found) | shared | back | own)
    return pl.DataFrame(rows, schema=tables.declared("moa_arms").schema)
