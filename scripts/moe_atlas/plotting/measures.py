"""The numbers behind the comparison figures: one value for each model, layer and panel."""

import numpy as np
import polars as pl

from moe_atlas.parametric.null import null_cosine_sd
from moe_atlas.plotting.arrays import balance, diagonal_share, load_array, pages_of, rank_array

COLUMNS = {
    "model": pl.String,
    "site": pl.String,
    "row": pl.String,  # which measure: the row of panels
    "column": pl.String,  # which matrix or corpus: the column of panels
    "layer": pl.Int64,
    "depth": pl.Float64,  # layer / last layer, 0..1
    "value": pl.Float64,
    "low": pl.Float64,  # 95 % interval, where there is one
    "high": pl.Float64,
    "chance": pl.Float64,  # what no relation, or an even router, gives
    "null_sd": pl.Float64,  # standard deviation around chance, where it is known
}
NUMBER = pl.col("a").str.contains(r"^\d+$") & pl.col("b").str.contains(r"^\d+$")


def measures(name: str, frames: dict[str, pl.DataFrame], checkpoints: dict[str, dict] | None = None) -> pl.DataFrame:
    """Tidy numbers (COLUMNS) of the comparison `name` from the tables of all models.

    `checkpoints`: checkpoint.json by model; gives the number of layers and the sizes that the null needs.
    """
    checkpoints = checkpoints or {}
    rows = _FUNCTIONS[name](frames, checkpoints)
    full = [{**dict.fromkeys(COLUMNS), "site": "ffn", **row} for row in rows]
    frame = pl.DataFrame(full, schema=COLUMNS)
    last = {model: max(part["layer"]) for (model,), part in pages_of(frame, ("model",)).items()}
    last.update({model: checkpoint["L"] - 1 for model, checkpoint in checkpoints.items()})
    depth = [layer / max(last[model], 1) for model, layer in zip(frame["model"], frame["layer"], strict=True)]
    return frame.with_columns(pl.Series("depth", depth, dtype=pl.Float64))


def _weight_similarity(frames, checkpoints):
    pairs = frames["similarity"].filter(NUMBER & (pl.col("a") != pl.col("b")) & (pl.col("matrix") != "router"))
    means = pairs.group_by("model", "level", "matrix", "layer", maintain_order=True).agg(pl.col("cosine").mean())
    for row in means.iter_rows(named=True):
        sizes = checkpoints.get(row["model"])
        null_sd = None
        if sizes:
            matrix = (sizes["m"], sizes["d"])
            null_sd = null_cosine_sd(matrix if row["level"] == "matrix" else matrix[1:])
        level = "matrix level" if row["level"] == "matrix" else "mean neuron"
        yield {
            "model": row["model"], "row": level, "column": row["matrix"], "layer": row["layer"],
            "value": row["cosine"], "chance": 0.0, "null_sd": null_sd,
        }  # fmt: skip


def _neuron_matching(frames, checkpoints):
    pairs = frames["matching"].filter(NUMBER).with_columns(excess=pl.col("cosine_after") - pl.col("null_after_mean"))
    rows = (("cosine above\nchance", "excess", "null_after_sd"), ("Kendall's tau", "tau", "null_tau_sd"))
    means = pairs.group_by("model", "matrix", "layer", maintain_order=True).agg(
        pl.col("excess", "tau", "null_after_sd", "null_tau_sd").mean()
    )
    for each in means.iter_rows(named=True):
        for row, value, null_sd in rows:
            yield {
                "model": each["model"], "row": row, "column": each["matrix"], "layer": each["layer"],
                "value": each[value], "chance": 0.0, "null_sd": each[null_sd],
            }  # fmt: skip


def _projection(frames, checkpoints):
    first = frames["explained_variance"].filter((pl.col("component") == 1) & pl.col("ratio").is_not_null())
    for row in first.iter_rows(named=True):
        yield {
            "model": row["model"], "row": {"matrix": "experts", "neuron": "neurons"}[row["level"]],
            "column": row["matrix"], "layer": row["layer"], "value": row["ratio"] - row["null_ratio"], "chance": 0.0,
            "null_sd": row["null_sd"],
        }  # fmt: skip


def _router_regression(frames, checkpoints):
    for row in frames["regression"].iter_rows(named=True):
        yield {
            "model": row["model"], "row": "Pearson r", "column": row["matrix"], "layer": row["layer"],
            "value": row["r"], "low": row["r_low"], "high": row["r_high"], "chance": 0.0,
        }  # fmt: skip


def _output_similarity(frames, checkpoints):
    pairs = frames["output_similarity"].filter(NUMBER & (pl.col("a") != pl.col("b")))
    keys = ("model", "corpus", "site", "layer")
    means = pairs.group_by(*keys, maintain_order=True).agg(pl.col("angular_mean").mean())
    for row in means.iter_rows(named=True):
        yield {
            "model": row["model"], "site": row["site"], "row": "mean angular similarity", "column": row["corpus"],
            "layer": row["layer"], "value": row["angular_mean"], "chance": 0.5,
        }  # fmt: skip


def _by_layer(frame: pl.DataFrame, rows_of):
    """rows_of(part) -> (row name, value, chance) for each model, corpus, site and layer."""
    for (model, corpus, site, layer), part in pages_of(frame, ("model", "corpus", "site", "layer")).items():
        for row, value, chance in rows_of(part):
            yield {
                "model": model, "site": site, "row": row, "column": corpus, "layer": layer, "value": value,
                "chance": chance,
            }  # fmt: skip


def _norm_score(frames, checkpoints):
    def rows_of(part):
        share = diagonal_share(rank_array(part))
        yield "largest norm has\nhighest score", float(share[-1]), 1 / len(share)
        yield "norm rank equals\nscore rank", float(np.nanmean(share)), 1 / len(share)

    return _by_layer(frames["rank_counts"], rows_of)


def _load_balance(frames, checkpoints):
    def rows_of(part):
        entropy, violation = balance(load_array(part))
        yield "normalised entropy", entropy, 1.0
        yield "MaxVio", violation, 0.0

    return _by_layer(frames["load"], rows_of)


def _top_score(frames, checkpoints):
    def rows_of(part):
        tokens, weights = load_array(part), load_array(part, "weight_sum")
        for rank, row in ((0, "weight of the\nfirst choice"), (1, "weight of the\nsecond choice")):
            if rank < tokens.shape[1] and tokens[:, rank].sum() > 0:
                yield row, float(weights[:, rank].sum() / tokens[:, rank].sum()), None

    return _by_layer(frames["load"], rows_of)


# (measure, subject) of the table specialization -> row of panels, and what is taken off its values
_SPECIALIZATION = {
    ("co_activation", "mean_abs"): ("co-activation,\nmean |C − chance|", "chance"),
    ("repeat_top1", "layer"): ("same first choice\nas the token before", "chance"),
    ("context_independence", "layer"): ("context\nindependence", "random_router"),
    ("vocabulary_input", "layer"): ("vocabulary,\ninput token", "random_router"),
}


def _specialization(frames, checkpoints):
    frame = frames["specialization"].filter(pl.col("subject").is_in(["layer", "mean_abs"]))
    for (measure, subject), (row, level) in _SPECIALIZATION.items():
        part = frame.filter((pl.col("measure") == measure) & (pl.col("subject") == subject))
        part = part.with_columns(pl.col("value", "low", "high") - pl.col(level))
        for each in part.iter_rows(named=True):
            yield {
                "model": each["model"], "site": each["site"], "row": row, "column": each["corpus"],
                "layer": each["layer"], "value": each["value"], "low": each["low"], "high": each["high"], "chance": 0.0,
            }  # fmt: skip


def _saturation(frames, checkpoints):
    rows = (("share of experts\nin common", "overlap", ""), ("same first\nchoice", "top1", "top1_"))
    rows += (("divergence of the\nloads (bits)", "js_divergence", "js_"),)
    for each in frames["saturation"].iter_rows(named=True):
        for row, value, prefix in rows:
            # A divergence has a level of its own in each layer: its table says more than a line here.
            chance = None if prefix == "js_" else each[f"{prefix}chance"]
            yield {
                "model": each["model"], "site": each["site"], "row": row, "column": each["corpus"],
                "layer": each["layer"], "value": each[value], "low": each[f"{prefix}low"],
                "high": each[f"{prefix}high"], "chance": chance,
            }  # fmt: skip


_FUNCTIONS = {
    "weight_similarity": _weight_similarity,
    "neuron_matching": _neuron_matching,
    "projection": _projection,
    "router_regression": _router_regression,
    "output_similarity": _output_similarity,
    "norm_score": _norm_score,
    "load_balance": _load_balance,
    "top_score": _top_score,
    "specialization": _specialization,
    "saturation": _saturation,
}
