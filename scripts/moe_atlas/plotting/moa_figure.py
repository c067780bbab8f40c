"""One figure of the MoA experiments by its name, from the tables of all objectives."""

import polars as pl
from matplotlib.figure import Figure

from moe_atlas.plotting import moa_arms, moa_training
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.moa_arms import About
from moe_atlas.plotting.registry import MOA_FIGURES, requested

_DRAW = moa_arms.FIGURES | moa_training.FIGURES


def draw(name: str, frames: dict[str, pl.DataFrame], about: About | None = None) -> Figure:
    """The figure `name`, FIGURE.OBJECTIVE, from the tables moa_* by name.

    Raises AtlasError where there is no such figure, no objective is named, or a table it needs is missing. Where the
    tables have nothing of the objective the figure says so.
    """
    base, objective, figure = requested(name, MOA_FIGURES, frames, "objective")
    about = about or About()
    own = {table: frames[table].filter(objective=objective) for table in figure.tables}
    if any(frame.is_empty() for frame in own.values()):
        what = "contrasts" if base == "differences" else "runs"
        return sentence(moa_arms.title_of(base, objective, about), f"The tables hold no {what} of {objective}.")
    return _DRAW[base](objective, about, own)
