"""What the notebooks call: the tables of one model, figures as png, small tables as HTML."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from moe_atlas import pages, tables
from moe_atlas.files import read_json
from moe_atlas.plotting.base import Experiment, Page
from moe_atlas.plotting.model import experiment, read_tables
from moe_atlas.plotting.registry import EXPERIMENTS, split
from moe_atlas.plotting.style import png


class Model:
    """Results of one model: `checkpoint` (checkpoint.json), its corpora, its tables and figures.

    Raises AtlasError when a file is missing or is not what the data contract says.
    """

    def __init__(self, model: str, results: str | Path = "results"):
        self.model, self.directory = model, Path(results) / "models" / model
        self.checkpoint = read_json(self.directory / "checkpoint.json")

    @property
    def has_experts(self) -> bool:
        return self.checkpoint["N"] > 0

    @property
    def has_ffn_experts(self) -> bool:
        return bool(self.checkpoint["moe_layers"])

    def summary(self, of_weights: bool) -> str:
        """A sentence on the model's shape; `of_weights`: for a page of what is known of the FFN experts' weights."""
        shape = self.checkpoint
        start = f"**{self.model}**: {shape['architecture']}, {shape['L']} layers, "
        if self.has_ffn_experts:
            return (
                f"{start}{len(shape['moe_layers'])} of them with experts; {shape['N']} experts, {shape['k']} a token, "
                f"{shape['shared']} shared; hidden width {shape['d']}, expert width {shape['m']}."
            )
        if self.has_experts:
            experts = f"{shape['N']}, {shape['k']} a token; hidden width {shape['d']}."
            nothing = " The sections below are about FFN experts, so they have nothing to show." if of_weights else ""
            return f"{start}with experts in attention alone: {experts}{nothing}"
        return f"{start}none of them with experts: this is a dense model, so the sections below have nothing to show."

    def corpora(self) -> dict[str, str]:
        """Corpora this model has tables of, id -> short or long."""
        found = sorted(path.parent for path in self.directory.glob("behavioral/*/tokens.parquet"))
        return {path.name: "short" if (path / "routing.parquet").exists() else "long" for path in found}

    def table(self, name: str, corpus: str | None = None) -> pl.DataFrame:
        """One table of the data contract."""
        return tables.read(name, self._path(name, corpus))

    def figure(self, name: str) -> Experiment:
        """The figures called `name` (experiment or experiment.corpus)."""
        base, corpus = split(name)
        paths = [self._path(table, corpus) for table in EXPERIMENTS[base].tables]
        return experiment(self.model, name, read_tables(paths))

    def _path(self, name: str, corpus: str | None) -> Path:
        return self.directory / tables.TABLES[name].path.format(corpus=corpus)


def show(figure: Figure) -> None:
    """Put a figure into the notebook as png."""
    display(Image(png(figure)))


def show_overview(drawn: Experiment) -> None:
    """All layers at a glance."""
    show(drawn.overview())


def page_of(pages_: Sequence[Page], layer: int | str | None = None) -> Page | None:
    """The page of a layer, by default of the last one with experts; None if there is none.

    FFN experts come first; attention experts are shown where a model has no others.
    """
    sites = {page.site for page in pages_}
    site = "ffn" if "ffn" in sites or not sites else min(sites)
    found = [page for page in pages_ if page.site == site and (page.layer != "all" or layer == "all")]
    return next((page for page in reversed(found) if layer is None or page.layer == layer), None)


def show_layer(drawn: Experiment, layer: int | str | None = None, which: str = "auto") -> None:
    """The figure of one layer with its caption, by default of the last one with experts; nothing if there is none."""
    page = page_of(drawn.pages, layer)
    if page is None:
        return
    drawing = drawn.draw(page)
    drawing.apply(drawn.ranges(page, which), which)
    show(drawing.figure)
    say(drawn.caption(page, which))


def say(text: str) -> None:
    """A paragraph of text that the cell computed."""
    display(Markdown(text))


def show_table(frame: pl.DataFrame, decimals: int = 3) -> None:
    """A small table, numbers rounded to `decimals` places."""
    if frame.is_empty():
        say("No rows.")
        return
    numeric = {i for i, dtype in enumerate(frame.dtypes) if dtype.is_numeric()}
    rows = [[_cell(value, decimals) for value in row] for row in frame.iter_rows()]
    display(HTML(pages.table([pages.escape(name) for name in frame.columns], rows, numeric)))


def _cell(value: object, decimals: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{decimals}f}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else pages.escape(value)
