"""Arms against their baselines, seed by seed: mean difference, Student's interval, paired t-test."""

import numpy as np
import polars as pl
from scipy import stats

from moe_atlas import tables
from moe_atlas.claims.verdict import holm
from moe_atlas.errors import AtlasError
from moe_atlas.tuning.arms import contrasts
from moe_atlas.tuning.settings import GROUP

LEVEL = 0.95
_SAME = ("study", "model", "backbone", "task", "fraction", "test", "metric", "seed")
_SHAPE = ("experts", "k", "layers")


def differences(runs: pl.DataFrame) -> pl.DataFrame:
    """The table emoe_differences of the table emoe_runs.

    Runs are paired by study, model, task, share of the data, test and seed: both have the same head before the first
    step and the same order of examples. Where both arms have experts, they are of the same shape, or, if one is made of
    copies, in the same layers. The interval is over seeds alone: the test texts are the same, so that it says nothing
    of other texts. Groups of a test, subjects of questions, are not compared: there are too many of them for the
    adjusted p.
    """
    whole = ~pl.col("test").str.contains(GROUP, literal=True)
    tested = runs.filter(whole, pl.col("test") != "validation", pl.col("chosen"))
    if tested.select(*_SAME, *_SHAPE, "arm").is_duplicated().any():
        raise AtlasError("emoe_runs: a run is there twice; delete results/emoe/runs and run again.")
    arms = tested["arm"].unique().to_list()
    rows = []
    for arm, baseline in contrasts():
        if arm in arms and baseline in arms:
            rows += _contrast(tested, arm, baseline)
    if not rows:
        return pl.DataFrame(schema=tables.declared("emoe_differences").schema)
    frame = pl.DataFrame(rows, schema_overrides=dict.fromkeys(("low", "high", "p_value"), pl.Float64))
    adjusted = [_adjusted(group) for _, group in frame.group_by("study", "model", maintain_order=True)]
    return tables.conform("emoe_differences", pl.concat(adjusted))


def _adjusted(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with Holm's adjusted p over those that have one."""
    known = [i for i, p in enumerate(rows["p_value"]) if p is not None]
    values: list[float | None] = [None] * len(rows)
    for i, p in zip(known, holm([rows["p_value"][i] for i in known]), strict=True):
        values[i] = p
    return rows.with_columns(p_adjusted=pl.Series(values, dtype=pl.Float64))


def _contrast(tested: pl.DataFrame, arm: str, baseline: str) -> list[dict]:
    """One row for each test, task and shape of the arm that the baseline was run with too."""
    ours, theirs = (tested.filter(pl.col("arm") == name) for name in (arm, baseline))
    by = list(_SAME)
    if not {"dense", "lora"} & {arm, baseline} and theirs["experts"].null_count() < len(theirs):
        by += ("layers",) if "gmoe" in (arm, baseline) else _SHAPE
    pairs = ours.join(theirs.select(*by, other="value"), on=by, how="inner", nulls_equal=True)
    rows = []
    keys = ["study", "model", "backbone", "task", *_SHAPE, "fraction", "test", "metric"]
    for values, group in pairs.group_by(keys, maintain_order=True):
        found = (group["value"] - group["other"]).to_numpy()
        low, high, p = paired(found)
        row = dict(zip(keys, values, strict=True)) | {"arm": arm, "baseline": baseline, "seeds": len(found)}
        rows.append(row | {"difference": float(found.mean()), "low": low, "high": high, "p_value": p})
    return rows


def paired(found: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """(low, high, p) of the mean of differences (n,): Student's t with n - 1 degrees, two-sided.

    None below two of them, and where all are equal but not 0: scores are counted in whole examples, so that a few seeds
    can agree by chance, and nothing is known of their spread. All 0, as of two arms that are one, is 0 to 0 and no p.
    """
    count = len(found)
    if count < 2:
        return None, None, None
    mean, error = found.mean(), found.std(ddof=1) / np.sqrt(count)
    if error <= 1e-12 * max(abs(mean), 1e-300):
        return (0.0, 0.0, None) if mean == 0 else (None, None, None)
    reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * error
    return float(mean - reach), float(mean + reach), float(2 * stats.t.sf(abs(mean) / error, count - 1))
