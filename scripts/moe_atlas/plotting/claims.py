"""Claims by models: a cell is a verdict, with the estimate, its value under the null, and its interval."""

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure

# Told apart by shape as well as by colour.
VERDICTS = {
    "holds": {"marker": "o", "color": COLOURS[2]},
    "does not hold": {"marker": "X", "color": COLOURS[1]},
    "cannot be told": {"marker": "s", "color": "0.55", "markerfacecolor": "white"},
}
_LEFT, _CELL, _ROW, _HEAD, _FOOT = 2.0, 1.06, 0.31, 0.78, 0.34


def claims(table: pl.DataFrame, title: str, subtitle: str, corpora: list[str] | None = None) -> Figure:
    """The table claims as a grid: rows are claims, of each text one; columns are models with experts.

    corpora: texts to draw, in this order; all of the table without it.
    """
    tried = table.filter(pl.col("estimate").is_not_null())["model"].unique(maintain_order=True).to_list()
    if not tried:
        return sentence(title, "No claim could be tried on any model: the reasons are in the table claims.")
    table = table.filter(pl.col("model").is_in(tried))
    order = corpora or table["corpus"].drop_nulls().unique(maintain_order=True).to_list()
    table = table.filter(pl.col("corpus").is_null() | pl.col("corpus").is_in(order))
    rows = _rows(table, order)
    figure = new_figure(max(WIDTH, _LEFT + _CELL * len(tried) + 0.1), _HEAD + _ROW * len(rows) + _FOOT)
    heading(figure, title, subtitle)
    axes = add_axes(figure, _LEFT, _HEAD, _CELL * len(tried), _ROW * len(rows))
    axes.set(xlim=(0, len(tried)), ylim=(len(rows), 0), xticks=[i + 0.5 for i in range(len(tried))])
    axes.set_xticklabels(tried)
    axes.xaxis.tick_top()
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [_label(*row) for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.hlines(range(len(rows) + 1), 0, len(tried), color="0.88", linewidth=0.5)
    places = {row: i for i, row in enumerate(rows)}
    for row in table.iter_rows(named=True):
        # A claim about a text that this model has not read has no row of its own where another model has.
        if (row["claim"], row["corpus"]) in places:
            _cell(axes, tried.index(row["model"]), places[row["claim"], row["corpus"]], row)
    handles = [Line2D([], [], linestyle="", markersize=6, label=name, **look) for name, look in VERDICTS.items()]
    figure.legend(handles=handles, loc="lower left", ncols=3, bbox_to_anchor=(0.02, 0.0))
    return figure


def _rows(table: pl.DataFrame, order: list[str]) -> list[tuple[str, str | None]]:
    """(claim, corpus) in the order of the sheet and of the texts, once each; a text that no model has is left out."""
    places = {None: -1} | {corpus: i for i, corpus in enumerate(order)}
    names = table["claim"].unique(maintain_order=True).to_list()
    found = set(table.select("claim", "corpus").iter_rows())
    told = {claim for claim, corpus in found if corpus is not None}
    kept = [pair for pair in found if pair[1] is not None or pair[0] not in told]
    return sorted(kept, key=lambda pair: (names.index(pair[0]), places[pair[1]]))


def _label(claim: str, corpus: str | None) -> str:
    return claim.replace("-", " ") + (f"\n{corpus}" if corpus else "")


def _cell(axes, column: int, row: int, claim: dict) -> None:
    look = VERDICTS[claim["verdict"]]
    axes.plot([column + 0.1], [row + 0.5], linestyle="", markersize=6, **look)
    text = "too few data"
    if claim["estimate"] is not None:
        known = claim["low"] is not None and claim["high"] is not None
        text = f"{_short(claim['estimate'])} (null {_short(claim['null'])})\n"
        text += f"[{_short(claim['low'])}, {_short(claim['high'])}]" if known else "no interval"
    axes.text(column + 0.2, row + 0.5, text, fontsize=7, va="center", color="0.15")


def _short(value: float) -> str:
    """Two decimals, without a minus before zero."""
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00")
