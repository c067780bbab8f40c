"""Arms against their baselines, seed by seed: mean difference, Student's interval, paired t-test, Holm's correction."""

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.claims.verdict import holm
from moe_atlas.errors import AtlasError
from moe_atlas.moa.settings import Settings
from moe_atlas.tuning.differences import paired


def of_studies(settings: Settings, name: str, frames: list[pl.DataFrame]) -> pl.DataFrame:
    """A table of all jobs with the rows of every study: an arm that several studies have was trained for the first.

    name: moa_runs, moa_curves or moa_throughput; frames: what the jobs wrote.
    """
    every = pl.concat(frames)
    parts = []
    for study in settings.studies.values():
        for arm in study.arms:
            job = settings.owner(study.name, arm)
            rows = every.filter(study=job.study, objective=job.objective, arm=arm)
            if not len(rows):
                raise AtlasError(f"{name}: {job.study}, {arm} was not trained; delete results/moa/runs and run again.")
            parts.append(rows.with_columns(study=pl.lit(study.name)))
    return tables.conform(name, pl.concat(parts))


def differences(settings: Settings, runs: pl.DataFrame) -> pl.DataFrame:
    """The table moa_differences of the table moa_runs, for the contrasts of the settings.

    Runs are paired by seed: both read the same texts in the same order. Perplexities are compared by their natural
    logarithm. The interval is over seeds alone: the test texts are the same, so that it says nothing of other texts.
    """
    tested = runs.filter(pl.col("test") != "validation", pl.col("chosen"))
    if tested.select("study", "arm", "seed", "test", "metric").is_duplicated().any():
        raise AtlasError("moa_runs: a run is there twice; delete results/moa/runs and run again.")
    rows = []
    for study in settings.studies.values():
        found = [
            row
            for arm, baseline in study.contrasts
            for row in _contrast(tested.filter(study=study.name), arm, baseline)
        ]
        known = [row for row in found if row["p_value"] is not None]
        for row, p in zip(known, holm([row["p_value"] for row in known]), strict=True):
            row["p_adjusted"] = p
        rows += found
    return pl.DataFrame(rows, schema=tables.declared("moa_differences").schema)


def _contrast(tested: pl.DataFrame, arm: str, baseline: str) -> list[dict]:
    """One row for each test and metric that both arms have."""
    keys = ["study", "objective", "test", "metric"]
    ours, theirs = tested.filter(arm=arm), tested.filter(arm=baseline)
    pairs = ours.join(theirs.select(*keys, "seed", other="value"), on=[*keys, "seed"], how="inner").sort(*keys, "seed")
    rows = []
    for values, group in pairs.group_by(keys, maintain_order=True):
        named = dict(zip(keys, values, strict=True))
        mine, other = group["value"].to_numpy(), group["other"].to_numpy()
        apart = np.log(mine) - np.log(other) if named["metric"] == "perplexity" else mine - other
        low, high, p = paired(apart)
        named |= {"arm": arm, "baseline": baseline, "seeds": len(apart), "difference": float(apart.mean())}
        rows.append(named | {"low": low, "high": high, "p_value": p, "p_adjusted": None})
    return rows
