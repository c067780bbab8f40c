"""Figures of EMoE's fine-tuning: paired differences to dense tuning with their intervals (arXiv 2310.10908)."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_atlas.plotting.base import GREY, sentence
from moe_atlas.plotting.emoe import limits_of, points, share_text, title_of
from moe_atlas.plotting.style import COLOURS, MARKERS, WIDTH, add_axes, heading, new_figure

_DIVERGING = matplotlib.colormaps["RdBu_r"].with_extremes(bad=GREY)
_GAP, _HEAD = 0.16, 0.85
_MOST_TASKS, _MOST_PANELS = 4, 6
_INTERVAL = "mean over seeds of the paired difference, with its 95 % interval"
_EMOE = "emoe"  # the arm whose shape, layers and share of the data are varied


def _look(number: int) -> dict:
    marker = MARKERS[number % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4, "linestyle": ""}


def _tests(table: pl.DataFrame) -> list[str]:
    """The reported tests; validation is what learning rates were chosen by."""
    return [test for test in table["test"].unique(maintain_order=True) if test != "validation"]


def _differences(frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    return frames["emoe_differences"].rename({"difference": "value"}).filter(pl.col("test") != "validation")


def _main(table: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """Rows with the most frequent value of each column among those of the arm emoe, and rows that have none there."""
    for column in columns:
        known = table.filter((pl.col("arm") == _EMOE) & pl.col(column).is_not_null())
        known = known if not known.is_empty() else table.filter(pl.col(column).is_not_null())
        if known.is_empty():
            continue
        counts = known.group_by(column, maintain_order=True).len().sort("len", descending=True, maintain_order=True)
        table = table.filter((pl.col(column) == counts[column][0]) | pl.col(column).is_null())
    return table


def _grid(
    title: str,
    subtitle: str,
    table: pl.DataFrame,
    draw: Callable[[object, pl.DataFrame, bool], None],
    height: float,
    left: float = 0.85,
    handles: Sequence[Line2D] = (),
    label: str = "",
    shared: bool = True,
) -> Figure:
    """A panel for each test (down) and task (across); `draw(axes, rows, whether it is the first of its row)`."""
    tests, tasks = _tests(table), table["task"].unique(maintain_order=True).to_list()
    if len(tasks) > _MOST_TASKS:
        subtitle += f" (first {_MOST_TASKS} of {len(tasks)} tasks)"
        tasks = tasks[:_MOST_TASKS]
    width = (WIDTH - left - 0.1 - _GAP * (len(tasks) - 1)) / max(len(tasks), 2)
    figure = new_figure(WIDTH, _HEAD + len(tests) * (height + 0.5) + (0.35 if handles else 0.1))
    heading(figure, title, subtitle)
    for i, test in enumerate(tests):
        row = table.filter((pl.col("test") == test) & pl.col("task").is_in(tasks))
        for j, task in enumerate(tasks):
            axes = add_axes(figure, left + j * (width + _GAP), _HEAD + i * (height + 0.5), width, height)
            axes.set_title(f"{task}\n{test}" if i == 0 else test)
            draw(axes, row.filter(pl.col("task") == task), j == 0)
            if shared and not row.is_empty():
                axes.set_ylim(limits_of(row, 0.0))
                axes.tick_params(labelleft=j == 0)
            if j == 0 and label:
                axes.set_ylabel(label)
    if handles:
        figure.legend(handles=list(handles), loc="lower left", ncols=min(len(handles), 6), bbox_to_anchor=(0.02, 0.0))
    return figure


def arms(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """Each way to tune minus its baseline, for each task and test, with all of the training data."""
    table = _differences(frames)
    table = _main(table.filter(pl.col("fraction") == table["fraction"].max()), "experts", "k", "layers")
    pairs = table.select("arm", "baseline").unique(maintain_order=True).rows()
    seeds = table["seeds"].max()

    def draw(axes, rows: pl.DataFrame, first: bool) -> None:
        axes.axvline(0, color="0.45", linestyle="--", linewidth=0.8)
        for place, (arm, baseline) in enumerate(pairs):
            own = rows.filter((pl.col("arm") == arm) & (pl.col("baseline") == baseline)).head(1)
            axes.hlines(np.full(len(own), place), own["low"], own["high"], color=COLOURS[0], linewidth=1.2)
            axes.plot(own["value"].to_numpy(), np.full(len(own), place), **_look(0))
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_yticks(range(len(pairs)), [f"{arm} − {baseline}" for arm, baseline in pairs] if first else [])
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)

    chosen = table.filter(pl.col("experts").is_not_null())
    shape = f", N = {chosen['experts'][0]}, k = {chosen['k'][0]}" if not chosen.is_empty() else ""
    subtitle = f"Difference of the metric: {_INTERVAL}; {seeds} seeds{shape}"
    return _grid(title_of("arms", model), subtitle, table, draw, 0.17 * len(pairs) + 0.15, left=2.1, shared=False)


def grid(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """EMoE minus dense tuning, by the number of experts and the share of them that is chosen."""
    table = _differences(frames).filter((pl.col("arm") == _EMOE) & pl.col("experts").is_not_null())
    table = _main(table.filter(pl.col("fraction") == table["fraction"].max()), "layers")
    shapes = table.select("experts", "k").unique().sort("experts", "k").rows()
    if len(shapes) < 2:
        return sentence(title_of("grid", model), "EMoE was tuned with one number of experts and of chosen ones only.")
    counts = sorted({experts for experts, _ in shapes})
    shares = sorted({k / experts for experts, k in shapes})

    def draw(axes, rows: pl.DataFrame, first: bool) -> None:
        axes.axhline(0, color="0.45", linestyle="--", linewidth=0.8)
        for number, experts in enumerate(counts):
            own = rows.filter(pl.col("experts") == experts).sort("k")
            places = np.array([shares.index(k / experts) for k in own["k"]]) + 0.15 * (number - (len(counts) - 1) / 2)
            points(axes, places, own, _look(number))
        axes.set_xlim(-0.5, len(shares) - 0.5)
        axes.set_xticks(range(len(shares)), [f"{share:.3g}" for share in shares])
        axes.set_xlabel("k/N")

    handles = [Line2D([], [], label=f"N = {experts}", **_look(i)) for i, experts in enumerate(counts)]
    subtitle = f"emoe − dense, difference of the metric: {_INTERVAL}"
    return _grid(title_of("grid", model), subtitle, table, draw, 1.2, handles=handles, label="difference")


def layers(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """EMoE minus dense tuning, by which layers have experts."""
    table = _differences(frames).filter((pl.col("arm") == _EMOE) & pl.col("layers").is_not_null())
    table = _main(table.filter(pl.col("fraction") == table["fraction"].max()), "experts", "k")
    places = table["layers"].unique(maintain_order=True).to_list()
    places.sort(key=lambda text: [int(layer) for layer in text.replace(",", " ").split()])
    if len(places) < 2:
        return sentence(title_of("layers", model), "EMoE was tuned with one choice of layers only.")

    def draw(axes, rows: pl.DataFrame, first: bool) -> None:
        axes.axhline(0, color="0.45", linestyle="--", linewidth=0.8)
        points(axes, np.array([places.index(text) for text in rows["layers"]]), rows, _look(0))
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlabel("layers with experts")

    experts, k = table.select("experts", "k").row(0)
    subtitle = f"emoe − dense, difference of the metric: {_INTERVAL}; N = {experts}, k = {k}"
    return _grid(title_of("layers", model), subtitle, table, draw, 1.2, label="difference")


def fraction(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """Dense tuning and EMoE by the share of the training data; a dot is a seed."""
    runs = frames["emoe_runs"].filter(pl.col("arm").is_in([_EMOE, "dense"]) & (pl.col("test") != "validation"))
    runs = _main(runs, "experts", "k", "layers")
    shares = sorted(runs["fraction"].unique())
    if len(shares) < 2:
        return sentence(title_of("fraction", model), "All models were tuned on the same share of the training data.")
    names = [arm for arm in ("dense", _EMOE) if arm in set(runs["arm"])]
    runs = runs.with_columns(low=pl.col("value"), high=pl.col("value"))

    def draw(axes, rows: pl.DataFrame, first: bool) -> None:
        for number, arm in enumerate(names):
            own = rows.filter(pl.col("arm") == arm)
            look = _look(number)
            places = np.array([shares.index(share) for share in own["fraction"]]) + 0.16 * (number - 0.5)
            axes.plot(
                places, own["value"].to_numpy(), **(look | {"markersize": 2.5, "alpha": 0.6, "markeredgewidth": 0})
            )
            mean = own.group_by("fraction").agg(pl.col("value").mean()).sort("fraction")
            at = [shares.index(share) + 0.16 * (number - 0.5) for share in mean["fraction"]]
            axes.plot(at, mean["value"].to_numpy(), color=look["color"], linewidth=1)
        axes.set_xticks(range(len(shares)), [f"{share:g}" for share in shares])
        axes.set_xlim(-0.5, len(shares) - 0.5)
        axes.set_xlabel("share of the training data")

    handles = [Line2D([], [], label=arm, **(_look(i) | {"linestyle": "-"})) for i, arm in enumerate(names)]
    subtitle = "The metric; a dot is a seed, lines join the means. Intervals of the differences are in emoe_differences"
    table = runs.select("task", "test", "arm", "fraction", "value", "low", "high")
    figure = _grid(
        title_of("fraction", model), subtitle, table, draw, 1.3, handles=handles, label="metric", shared=False
    )
    return figure


def selection(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """Share of the choices that each expert has of the same tokens, at steps of the tuning."""
    table = frames["emoe_selection"].filter(pl.col("step").is_not_null())
    if table.is_empty():
        return sentence(title_of("selection", model), "Choices were not counted during any tuning.")
    table = table.filter(pl.col("seed") == table["seed"].min())
    keys = ("arm", "corpus", "layer", "experts", "k")
    parts = list(table.partition_by(keys, as_dict=True, maintain_order=True).items())
    shown, across = parts[:_MOST_PANELS], min(3, len(parts))
    left, gap, height = 0.55, 0.3, 1.5
    width = (WIDTH - left - 0.1 - gap * (across - 1)) / max(across, 2)
    down = -(-len(shown) // across)
    figure = new_figure(WIDTH, 0.85 + down * (height + 0.75) + 0.5)
    cut = f" (first {len(shown)} of {len(parts)})" if len(parts) > len(shown) else ""
    subtitle = (
        f"N × share of the choices of the same tokens; 1 is even. Experts sorted by their share at the first step{cut}"
    )
    heading(figure, title_of("selection", model), subtitle)
    norm = TwoSlopeNorm(1, 0, max(2.0, float((table["share"] * table["experts"]).max())))
    for number, ((arm, corpus, layer, experts, k), part) in enumerate(shown):
        row, column = divmod(number, across)
        axes = add_axes(figure, left + column * (width + gap), 0.85 + row * (height + 0.75), width, height)
        steps = sorted(part["step"].unique())
        shares = np.full((experts, len(steps)), np.nan)
        shares[part["expert"].cast(pl.Int64), [steps.index(step) for step in part["step"]]] = part["share"] * experts
        order = np.argsort(-shares[:, 0], kind="stable")
        image = axes.imshow(shares[order], cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(f"{arm} · {corpus}\nlayer {layer}, N = {experts}, {share_text(k, experts)}")
        axes.set_yticks([])
        places = sorted({0, len(steps) // 2, len(steps) - 1})
        axes.set_xticks(places, [str(steps[place]) for place in places])
        axes.set_xlabel("step")
        if column == 0:
            axes.set_ylabel("expert")
    bar = add_axes(figure, left, 0.85 + down * (height + 0.75) - 0.02, 2.6, 0.09)
    figure.colorbar(image, cax=bar, orientation="horizontal", label="N × share")
    return figure


FIGURES = {"arms": arms, "grid": grid, "layers": layers, "fraction": fraction, "selection": selection}
