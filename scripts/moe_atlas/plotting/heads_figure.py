"""One figure of attention experts by its name, from the tables of all models."""

import polars as pl
from matplotlib.figure import Figure

from moe_atlas.plotting import moa_heads
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.registry import HEADS_FIGURES, requested


def _of_objective(model: str) -> pl.Expr:
    """Rows of the model, and frozen routers of models trained here for the same objective."""
    parts = model.split(".")
    if len(parts) != 3:
        return pl.col("model") == model
    frozen = pl.col("model").str.contains(f".{parts[1]}.", literal=True) & (pl.col("router") == "frozen")
    return (pl.col("model") == model) | frozen


def draw(name: str, model: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """The figure `name`, FIGURE or FIGURE.CORPUS, of one model, from the tables of all.

    Raises AtlasError where there is no such figure, a table is missing, or a corpus is named where there is none. Where
    the tables have nothing of the model the figure says so.
    """
    base, corpus, figure = requested(name, HEADS_FIGURES, frames)
    own = {}
    for table in figure.tables:
        wanted = _of_objective(model) if table == "moa_association" else pl.col("model") == model
        own[table] = frames[table].filter(wanted)
        if corpus and table != "moa_sites":
            own[table] = own[table].filter(pl.col("corpus") == corpus)
    if base != "sites" and any(frame.filter(pl.col("model") == model).is_empty() for frame in own.values()):
        return sentence(moa_heads.title_of(base, model, corpus), f"The tables hold nothing of {model} here.")
    return moa_heads.FIGURES[base](model, corpus, own)
