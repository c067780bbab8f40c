"""Figures of the MoA experiments' arms: perplexity by size, translation, the grid of E, k and D, and routings."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.labels import place_labels
from moe_atlas.plotting.registry import MOA_FIGURES
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure

Frames = dict[str, pl.DataFrame]
SHAPE, ROUTING = ("experts", "k", "head_dim"), ("normalization", "balance", "z", "router")
MHA = {"color": COLOURS[1], "marker": "s", "markersize": 4.5, "linestyle": ""}
MOA = {"color": COLOURS[0], "marker": "o", "markersize": 4.5, "linestyle": ""}
DENSE = MOA | {"markerfacecolor": "white"}
OTHER = MOA | {"marker": "D", "markersize": 3, "markerfacecolor": "white"}
NAMES = {"perplexity": "perplexity", "bleu": "BLEU", "exact": "exact match"}
_LEVEL = {"color": "0.45", "linestyle": "--", "linewidth": 0.8}
_HEAD = 0.72


@dataclass(frozen=True)
class About:
    """What the tables do not say of an objective: its texts; the share of a run's steps that follow its plateau."""

    texts: str = ""
    decay: float | None = None


def title_of(name: str, objective: str, about: About) -> str:
    """First line of a figure: objective, texts, what it shows."""
    return " · ".join(part for part in (objective, about.texts, MOA_FIGURES[name].title) if part)


def label_of(arm: dict) -> str:
    """An arm by its name; of one that selects nothing it says so."""
    return arm["arm"] + (" (selects nothing)" if arm["selects"] is False else "")


def look_of(arm: dict, usual: tuple) -> dict:
    """Marker and colour; `usual`: the routing of most arms."""
    if arm["attention"] == "mha":
        return MHA
    if tuple(arm[key] for key in ROUTING) != usual:
        return OTHER
    return DENSE if arm["selects"] is False else MOA


def usual_routing(rows: pl.DataFrame) -> tuple:
    """Normalisation, weights of the losses and router that most shapes of MoA have; the first of equals."""
    moa = rows.filter(attention="moa")
    counts = moa.unique(["arm"], keep="first", maintain_order=True).group_by(ROUTING, maintain_order=True)
    shapes = counts.agg(pl.struct(SHAPE).n_unique().alias("shapes")).sort(
        "shapes", descending=True, maintain_order=True
    )
    return shapes.select(ROUTING).row(0) if len(shapes) else (None,) * len(ROUTING)


def with_routing(rows: pl.DataFrame, usual: tuple) -> pl.DataFrame:
    """MoA arms of this routing."""
    wanted = [pl.col(key).eq_missing(pl.lit(value)) for key, value in zip(ROUTING, usual, strict=True)]
    return rows.filter(*wanted, attention="moa")


def reach(rows: pl.DataFrame, *more: float, least: float = 1e-9) -> tuple[float, float]:
    """A range that holds all values and most of each interval: what is far outside of the values would hide them."""
    values = np.array([*rows["value"].drop_nulls(), *more])
    room = max(float(np.ptp(values)), 0.02 * float(np.abs(values).max()), least)
    low = max(min([values.min(), *rows["low"].drop_nulls()]), values.min() - room)
    high = min(max([values.max(), *rows["high"].drop_nulls()]), values.max() + room)
    beside = max(0.07 * room, (room - (high - low)) / 2)
    return float(low - beside), float(high + beside)


def cut(rows: pl.DataFrame, limits: tuple[float, float]) -> str:
    """A sentence where intervals leave these limits."""
    outside = rows.filter((pl.col("low") < limits[0]) | (pl.col("high") > limits[1]))
    return "; intervals that reach the edge go on" if len(outside) else ""


def seeds_text(rows: pl.DataFrame) -> str:
    seeds = sorted(rows["seeds"].unique())
    if seeds == [1]:
        return "one seed, no interval"
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"mean over {counted} seeds with its 95 % interval (Student's t)"


def upper(text: str) -> str:
    """The first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def short(value: float, _place: object = None) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def across(axes, rows: pl.DataFrame, column: str) -> None:
    """Sizes along x, from the smallest to the largest, with room for names."""
    low, high = float(rows[column].min()), float(rows[column].max())
    room = max(high - low, 0.05 * high)
    axes.set_xlim(low - 0.1 * room, high + 0.12 * room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(short))


def legend(figure: Figure, looks: dict[str, dict], columns: int = 4) -> None:
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="lower left", ncols=columns, bbox_to_anchor=(0.02, 0.0), handletextpad=0.4)


def first_test(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Rows of this metric on the first test that has it."""
    rows = rows.filter(metric=metric)
    return rows.filter(test=rows["test"][0]) if len(rows) else rows


def metric_of(rows: pl.DataFrame) -> str:
    """BLEU where an objective has it, perplexity otherwise."""
    return "bleu" if "bleu" in rows["metric"] else "perplexity"


def perplexity(objective: str, about: About, frames: Frames) -> Figure:
    """Perplexity of every arm by parameters and by multiply-accumulates, the same y."""
    rows = first_test(frames["moa_arms"], "perplexity")
    usual, limits, side = usual_routing(rows), reach(rows), 3.3
    width = (WIDTH - 0.65 - 0.2 - 0.3) / 2
    figure = new_figure(WIDTH, _HEAD + side + 0.85)
    level = f"token frequencies alone have {rows['chance'].max():.4g}"
    subtitle = f"On the set {rows['test'][0]}: {seeds_text(rows)}; {level}{cut(rows, limits)}"
    heading(figure, title_of("perplexity", objective, about), subtitle)
    sizes = {"parameters": "parameters of the model", "macs": "multiply-accumulates a token"}
    for j, (column, name) in enumerate(sizes.items()):
        axes = add_axes(figure, 0.65 + j * (width + 0.3), _HEAD, width, side)
        axes.set_ylim(limits)
        across(axes, rows, column)
        axes.set_xlabel(name)
        for arm in rows.iter_rows(named=True):
            look = look_of(arm, usual)
            if arm["low"] is not None:
                axes.vlines(arm[column], arm["low"], arm["high"], color=look["color"], linewidth=0.9, alpha=0.75)
            axes.plot([arm[column]], [arm["value"]], **look)
        named = [arm for arm in rows.iter_rows(named=True) if look_of(arm, usual) is not OTHER]
        bars = rows.select(column, "low", "high").drop_nulls().rows()
        bars = [(x, max(low, limits[0]), min(high, limits[1])) for x, low, high in bars]
        colours = [look_of(arm, usual)["color"] for arm in named]
        names = [(arm[column], arm["value"], arm["arm"], colour) for arm, colour in zip(named, colours, strict=True)]
        place_labels(axes, names, bars, rows.select(column, "value").rows())
        if j:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("perplexity")
    looks = {"multi-head attention": MHA, "attention experts": MOA}
    if any(look_of(arm, usual) is DENSE for arm in rows.iter_rows(named=True)):
        looks["k = E: selects nothing"] = DENSE
    if any(look_of(arm, usual) is OTHER for arm in rows.iter_rows(named=True)):
        looks["with other routing"] = OTHER
    legend(figure, looks)
    return figure


def dots(axes, rows: pl.DataFrame, names: list[str], looks: list[dict], first: bool) -> None:
    """One arm a line: values along x with their intervals."""
    for place, (arm, look) in enumerate(zip(rows.iter_rows(named=True), looks, strict=True)):
        if arm["low"] is not None:
            axes.hlines(place, arm["low"], arm["high"], color=look["color"], linewidth=1)
        axes.plot([arm["value"]], [place], **look)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names if first else [])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)


def translation(objective: str, about: About, frames: Frames) -> Figure:
    """BLEU and exact match of every arm on every test, beside the best answer that knows no rule."""
    table = frames["moa_arms"].filter(pl.col("metric").is_in(["bleu", "exact"]))
    if table.is_empty():
        return sentence(title_of("translation", objective, about), "No arm has BLEU or exact match here.")
    tests, metrics = (table[key].unique(maintain_order=True).to_list() for key in ("test", "metric"))
    arms = table["arm"].unique(maintain_order=True).to_list()
    usual, height = usual_routing(table), 0.19 * len(arms) + 0.12
    left = 0.25 + 0.062 * max(len(label_of(arm)) for arm in table.iter_rows(named=True))
    width = (WIDTH - left - 0.15 - 0.35 * (len(metrics) - 1)) / len(metrics)
    figure = new_figure(WIDTH, _HEAD + len(tests) * (height + 0.62) + 0.28)
    subtitle = f"{upper(seeds_text(table))}; what leaves the scale is cut"
    heading(figure, title_of("translation", objective, about), subtitle)
    for i, test in enumerate(tests):
        for j, metric in enumerate(metrics):
            rows = table.filter(test=test, metric=metric)
            axes = add_axes(figure, left + j * (width + 0.35), _HEAD + 0.08 + i * (height + 0.62), width, height)
            named = list(rows.iter_rows(named=True))
            dots(axes, rows, [label_of(arm) for arm in named], [look_of(arm, usual) for arm in named], j == 0)
            for chance in rows["chance"].drop_nulls().unique():
                axes.axvline(chance, **_LEVEL)
            axes.set_xlim(0, 102 if metric == "bleu" else 1.02)
            axes.set_title(f"{NAMES[metric]}, {test}")
    looks = {"multi-head attention": MHA, "attention experts": MOA, "best answer that follows not all rules": _LEVEL}
    legend(figure, looks)
    return figure


def neighbours(shapes: list[tuple], shape: tuple) -> list[tuple]:
    """Shapes that differ from this one in one place."""
    return [other for other in shapes if sum(a != b for a, b in zip(shape, other, strict=True)) == 1]


def grid(objective: str, about: About, frames: Frames) -> Figure:
    """E, k and D, each varied while the other two stay, the same y in all panels."""
    table = frames["moa_arms"]
    metric = metric_of(table)
    table = first_test(table, metric)
    rows = with_routing(table, usual_routing(table)).unique(SHAPE, keep="first", maintain_order=True)
    shapes = rows.select(SHAPE).rows()
    title = title_of("grid", objective, about)
    base = max(shapes, key=lambda shape: len(neighbours(shapes, shape)), default=None)
    if base is None or not neighbours(shapes, base):
        return sentence(title, "All attention experts that were trained have the same E, k and D.")
    near = rows.filter(pl.Series([s == base or s in neighbours(shapes, base) for s in shapes]))
    limits = reach(near)
    width = (WIDTH - 0.65 - 0.15 - 0.15 * 2) / 3
    figure = new_figure(WIDTH, _HEAD + 0.2 + 1.8 + 0.75)
    level = f"; token frequencies alone: {near['chance'].max():.4g}" if metric == "perplexity" else ""
    subtitle = f"{upper(NAMES[metric])} on the set {near['test'][0]}: {seeds_text(near)}{level}{cut(near, limits)}"
    heading(figure, title, subtitle)
    letters = ("E", "k", "D")
    for j, column in enumerate(SHAPE):
        own = near.filter(pl.col(key) == base[place] for place, key in enumerate(SHAPE) if place != j).sort(column)
        axes = add_axes(figure, 0.65 + j * (width + 0.15), _HEAD + 0.2, width, 1.8)
        fixed = ", ".join(f"{letters[place]} = {base[place]}" for place in range(3) if place != j)
        axes.set_title(f"{letters[j]} at {fixed}")
        axes.plot(range(len(own)), own["value"].to_numpy(), color="0.75", linewidth=0.8, zorder=0)
        for place, arm in enumerate(own.iter_rows(named=True)):
            if arm["low"] is not None:
                axes.vlines(place, arm["low"], arm["high"], color=MOA["color"], linewidth=1)
            axes.plot([place], [arm["value"]], **(DENSE if arm["selects"] is False else MOA))
        axes.set(xlim=(-0.5, len(own) - 0.5), ylim=limits, xlabel=letters[j])
        axes.set_xticks(range(len(own)), [str(value) for value in own[column]])
        axes.tick_params(labelleft=j == 0)
        if j == 0:
            axes.set_ylabel(NAMES[metric])
    looks = {"chooses k of E": MOA}
    legend(figure, looks | ({"k = E: selects nothing": DENSE} if False in near["selects"].to_list() else {}))
    return figure


def routing_text(arm: dict, usual: tuple) -> str:
    """What is other than usual, in words."""
    names = {"normalization": "weights normalised", "balance": "balance loss", "z": "z-loss", "router": "router"}
    apart = [
        f"{names[key]}: {arm[key]:g}" if isinstance(arm[key], float) else f"{names[key]}: {arm[key]}"
        for key, value in zip(ROUTING, usual, strict=True)
        if arm[key] != value
    ]
    return ", ".join(apart) or "as all others"


def routing(objective: str, about: About, frames: Frames) -> Figure:
    """Attention experts of one shape with other losses, normalisations and routers."""
    table = frames["moa_arms"]
    metric = metric_of(table)
    table = first_test(table, metric)
    moa, usual = table.filter(attention="moa"), usual_routing(table)
    title = title_of("routing", objective, about)
    counts = moa.group_by(SHAPE, maintain_order=True).len().sort("len", descending=True, maintain_order=True)
    if counts.is_empty() or counts["len"][0] < 2:
        return sentence(title, "All attention experts that were trained are routed in the same way.")
    shape = counts.select(SHAPE).row(0)
    rows = moa.filter(pl.col(key) == value for key, value in zip(SHAPE, shape, strict=True))
    rows = pl.concat([with_routing(rows, usual), rows.join(with_routing(rows, usual), on="arm", how="anti")])
    named = list(rows.iter_rows(named=True))
    figure = new_figure(WIDTH, _HEAD + 0.34 * len(rows) + 0.95)
    words = dict(zip(ROUTING, usual, strict=True))
    common = (
        f"{words['normalization']} weights, balance {words['balance']:g}, z {words['z']:g}, {words['router']} router"
    )
    limits = reach(rows)
    subtitle = (
        f"E = {shape[0]}, k = {shape[1]}, D = {shape[2]}; all others: {common}. On the set {rows['test'][0]}: "
        f"{seeds_text(rows)}{cut(rows, limits)}"
    )
    heading(figure, title, subtitle)
    names = [f"{label_of(arm)}\n{routing_text(arm, usual)}" for arm in named]
    left = 0.25 + 0.06 * max(len(line) for name in names for line in name.split("\n"))
    axes = add_axes(figure, left, _HEAD + 0.08, WIDTH - left - 0.25, 0.34 * len(rows))
    dots(axes, rows, names, [look_of(arm, usual) for arm in named], True)
    axes.axvline(named[0]["value"], **_LEVEL)
    axes.set(xlim=limits, xlabel=NAMES[metric])
    legend(figure, {"as all others": MOA, "other routing": OTHER, "mean of the first": _LEVEL})
    return figure


FIGURES = {"perplexity": perplexity, "translation": translation, "grid": grid, "routing": routing}
