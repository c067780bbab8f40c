"""One figure of EMoE by its name, from the tables of all models."""

import polars as pl
from matplotlib.figure import Figure

from moe_atlas.plotting import emoe, emoe_tuning
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.registry import EMOE_FIGURES, requested

_DRAW = emoe.FIGURES | emoe_tuning.FIGURES


def draw(name: str, model: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """The figure `name`, FIGURE or FIGURE.CORPUS, of one model.

    Raises AtlasError where there is no such figure, a table it needs is missing, or a corpus is named where there is
    none. Where the tables have nothing of the model the figure says so.
    """
    base, corpus, figure = requested(name, EMOE_FIGURES, frames)
    own = {}
    for table in figure.tables:
        wanted = pl.col("model") == model
        own[table] = frames[table].filter(wanted & (pl.col("corpus") == corpus) if corpus else wanted)
    if any(frame.is_empty() for frame in own.values()):
        return sentence(emoe.title_of(base, model, corpus), f"The tables hold nothing of {model} here.")
    return _DRAW[base](model, corpus, own)
