"""Figures of the MoA experiments' runs: paired differences, training curves, throughput."""

import math

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.labels import place_labels
from moe_atlas.plotting.moa_arms import (
    DENSE,
    MHA,
    MOA,
    NAMES,
    OTHER,
    About,
    Frames,
    across,
    cut,
    legend,
    look_of,
    reach,
    title_of,
    usual_routing,
)
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure

_HEAD, _COLUMNS = 0.72, 4
_LEVEL = {"color": "0.45", "linestyle": "--", "linewidth": 0.8}
_APART = {"color": COLOURS[0], "marker": "o", "markersize": 4.5, "linestyle": ""}
_NOT_APART = _APART | {"markerfacecolor": "white"}
_SEEN = {"color": "0.1", "marker": "v", "markersize": 4, "linestyle": ""}
_UNSEEN = {"color": "0.1", "marker": "x", "markersize": 4, "linestyle": ""}
ALPHA = 0.05
_UNITS = {
    "perplexity": "%, left is better",
    "bleu": "points, right is better",
    "exact": "points of 100, right is better",
}


def in_units(rows: pl.DataFrame) -> pl.DataFrame:
    """Differences as they are shown: of log perplexity in per cent of it, of exact match in points of 100."""
    columns = ("difference", "low", "high")
    shown = [
        pl.when(metric="perplexity")
        .then((pl.col(name).exp() - 1) * 100)
        .when(metric="exact")
        .then(pl.col(name) * 100)
        .otherwise(pl.col(name))
        .alias(name)
        for name in columns
    ]
    return rows.with_columns(shown)


def differences(objective: str, about: About, frames: Frames) -> Figure:
    """Each contrast's paired difference with its interval, and p by Holm's method; studies one below the other."""
    table = in_units(frames["moa_differences"]).rename({"difference": "value"})
    tests, metrics = (table[key].unique(maintain_order=True).to_list() for key in ("test", "metric"))
    contrasts = table.select("study", "arm", "baseline").unique(maintain_order=True).rows()
    names = [f"{arm} − {baseline}" for _, arm, baseline in contrasts]
    places, studies, at = [], {}, 0.0  # a line for each contrast, half a line more above each study
    for study, _, _ in contrasts:
        at += 0.0 if study in studies else 0.8
        studies.setdefault(study, at - 0.8)
        places.append(at)
        at += 1.0
    height = 0.18 * (at + 0.2)
    left = 0.2 + 0.06 * max(len(name) for name in names)
    gap = 0.62
    width = (WIDTH - left - gap * len(metrics)) / len(metrics)
    figure = new_figure(WIDTH, _HEAD + len(tests) * (height + 0.68) + 0.25)
    seeds = sorted(table["seeds"].unique())
    text = "–".join(map(str, sorted({seeds[0], seeds[-1]})))
    subtitle = (
        f"Paired by seed, mean of {text} seeds with its 95 % interval (Student's t). Right of each panel p by Holm's "
        "method over all rows of the study; filled: below 0.05"
    )
    heading(figure, title_of("differences", objective, about), subtitle)
    edge = False
    for i, test in enumerate(tests):
        for j, metric in enumerate(metrics):
            rows = table.filter(test=test, metric=metric)
            axes = add_axes(figure, left + j * (width + gap), _HEAD + 0.1 + i * (height + 0.68), width, height)
            axes.set(ylim=(at - 0.3, -0.9))
            axes.set_xlabel(_UNITS[metric], fontsize=7)
            axes.set_title(f"{NAMES[metric]}, {test}", fontsize=7 if len(metrics) > 1 else 8)
            axes.axvline(0, **_LEVEL)
            if len(rows):
                limits = reach(rows, 0.0, least=0.1)
                edge = edge or bool(cut(rows, limits))
                axes.set_xlim(limits)
            for row in rows.iter_rows(named=True):
                place = places[contrasts.index((row["study"], row["arm"], row["baseline"]))]
                p = row["p_adjusted"]
                if row["low"] is not None:
                    axes.hlines(place, row["low"], row["high"], color=COLOURS[0], linewidth=1)
                axes.plot([row["value"]], [place], **(_APART if p is not None and p < ALPHA else _NOT_APART))
                shown = "–" if p is None else f"{p:.2g}" if p >= 0.001 else "<0.001"
                side = {"va": "center", "fontsize": 7, "transform": axes.get_yaxis_transform()}
                axes.text(1.02, place, shown, **side)
            axes.text(1.02, -0.85, "p", va="center", fontsize=7, transform=axes.get_yaxis_transform())
            axes.set_yticks(places, names if j == 0 else [])
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5 if len(metrics) == 1 else 3)
            if j == 0:
                for study, place in studies.items():
                    beside = {"ha": "right", "va": "center", "fontsize": 7, "fontstyle": "italic", "color": "0.35"}
                    axes.text(-0.02, place, study, transform=axes.get_yaxis_transform(), **beside)
    if edge:
        figure.text(
            0.02, 0.06 / figure.get_figheight(), "Intervals that reach the edge go on.", fontsize=7, va="bottom"
        )
    return figure


def plateau_step(steps: int, decay: float | None, looks: list[int]) -> int:
    """The look after which the rate fell in a run of so many steps; its last one where the share is not known."""
    if decay is None:
        return steps
    exact = [look for look in looks if look + round(decay * look) == steps]
    return exact[0] if exact else min(looks, key=lambda look: abs(look * (1 + decay) - steps))


def curves(objective: str, about: About, frames: Frames) -> Figure:
    """Validation loss of every seed of each arm, all arms on the same axes."""
    runs = frames["moa_runs"].filter(pl.col("chosen"))
    table = frames["moa_curves"].filter(pl.col("chosen"), split="validation")
    table = table.unique(["arm", "seed", "step"], keep="first", maintain_order=True)
    arms = table["arm"].unique(maintain_order=True).to_list()
    level = math.log(runs.filter(test="validation", metric="perplexity")["chance"].max() or 1.0)
    largest, smallest = max(table["loss"].max(), level), table["loss"].min()
    width = (WIDTH - 0.6 - 0.15 - 0.2 * (_COLUMNS - 1)) / _COLUMNS
    rows = math.ceil(len(arms) / _COLUMNS)
    figure = new_figure(WIDTH, _HEAD + rows * 1.3 + 0.6)
    ends = runs.unique(["arm", "seed"], keep="first", maintain_order=True)
    subtitle = (
        f"Nats a token on the validation texts, every seed; grey: all other arms; dashed: token frequencies alone. "
        f"{ends['plateau'].sum()} of {len(ends)} runs ended at a plateau"
    )
    heading(figure, title_of("curves", objective, about), subtitle)
    usual = usual_routing(runs)
    seeds = [part.sort("step") for part in table.partition_by("arm", "seed", maintain_order=True)]
    for number, arm in enumerate(arms):
        down, column = divmod(number, _COLUMNS)
        axes = add_axes(figure, 0.6 + column * (width + 0.2), _HEAD + 0.12 + down * 1.3, width, 0.95)
        axes.axhline(level, **_LEVEL)
        for part in seeds:
            if part["arm"][0] != arm:
                axes.plot(part["step"].to_numpy(), part["loss"].to_numpy(), color="0.87", linewidth=0.6, zorder=0)
        described = runs.filter(arm=arm).row(0, named=True)
        colour = look_of(described, usual)["color"]
        for part in seeds:
            if part["arm"][0] == arm:
                axes.plot(part["step"].to_numpy(), part["loss"].to_numpy(), color=colour, linewidth=0.9)
                end = ends.filter(arm=arm, seed=part["seed"][0])
                if len(end):
                    step = plateau_step(end["steps"][0], about.decay, part["step"].to_list())
                    loss = part.filter(step=step)["loss"]
                    axes.plot([step], loss.to_numpy()[:1], **(_SEEN if end["plateau"][0] else _UNSEEN))
        axes.set_title(arm, fontsize=7)
        if described["selects"] is False:
            axes.text(0.97, 0.75, "selects nothing", ha="right", va="top", fontsize=7, transform=axes.transAxes)
        axes.set(xlim=(0, table["step"].max() * 1.03), ylim=(smallest - 0.1, largest + 0.15))
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelleft=column == 0, labelbottom=number + _COLUMNS >= len(arms))
        if number + _COLUMNS >= len(arms):
            axes.set_xlabel("step")
        if column == 0:
            axes.set_ylabel("loss, nats")
    begins = "the rate begins to fall" if about.decay is not None else "end of the run"
    handles = {f"plateau seen, {begins}": _SEEN, f"no plateau in the largest number of steps, {begins}": _UNSEEN}
    figure.legend(
        handles=[Line2D([], [], label=name, **look) for name, look in handles.items()],
        **{"loc": "lower left", "ncols": 2, "bbox_to_anchor": (0.02, 0.0), "handletextpad": 0.4},
    )
    return figure


def throughput(objective: str, about: About, frames: Frames) -> Figure:
    """Tokens a second of training over those of the first multi-head arm, by multiply-accumulates."""
    runs = frames["moa_runs"].filter(pl.col("chosen")).unique(["arm", "seed"], keep="first", maintain_order=True)
    keys = ["arm", "seed", "learning_rate"]
    speeds = frames["moa_throughput"].unique(keys, keep="first", maintain_order=True)
    table = runs.join(speeds.select(*keys, "tokens_per_second"), on=keys, how="inner", maintain_order="left")
    title = title_of("throughput", objective, about)
    if table.filter(attention="mha").is_empty():
        return sentence(title, "No multi-head arm was trained that the others could be compared with.")
    arms = table.group_by("arm", maintain_order=True).agg(
        pl.all().exclude("arm", "tokens_per_second").first(), pl.col("tokens_per_second").median().alias("speed")
    )
    base = arms.filter(attention="mha").row(0, named=True)
    usual, width, height = usual_routing(runs), WIDTH - 0.65 - 0.15, 2.9
    figure = new_figure(WIDTH, _HEAD + height + 0.85)
    subtitle = (
        f"Training, over {base['arm']} ({base['speed']:,.0f} tokens a second): a dot is a run, a marker their median. "
        "It depends on the machine and on what else ran there; dashed: if time went with multiply-accumulates alone"
    )
    heading(figure, title, subtitle)
    axes = add_axes(figure, 0.65, _HEAD, width, height)
    across(axes, arms, "macs")
    shares = table["tokens_per_second"] / base["speed"]
    low, high = float(shares.min()), float(shares.max())
    axes.set_ylim(max(0.0, low - 0.12 * (high - low)), high + 0.12 * (high - low or 1))
    line = np.linspace(*axes.get_xlim(), 100)
    line = line[line > 0]
    axes.plot(line, base["macs"] / line, **_LEVEL)
    axes.axhline(1, color="0.8", linewidth=0.6, zorder=0)
    for arm in arms.iter_rows(named=True):
        look, own = look_of(arm, usual), table.filter(arm=arm["arm"])
        dots = {"markersize": 2, "alpha": 0.6, "markeredgewidth": 0, "markerfacecolor": look["color"]}
        axes.plot(own["macs"].to_numpy(), (own["tokens_per_second"] / base["speed"]).to_numpy(), **(look | dots))
        axes.plot([arm["macs"]], [arm["speed"] / base["speed"]], **look)
    named = [arm for arm in arms.iter_rows(named=True) if look_of(arm, usual) is not OTHER]
    names = [(arm["macs"], arm["speed"] / base["speed"], arm["arm"], look_of(arm, usual)["color"]) for arm in named]
    place_labels(axes, names, (), table.select("macs", pl.col("tokens_per_second") / base["speed"]).rows())
    axes.set(xlabel="multiply-accumulates a token", ylabel=f"tokens a second over {base['arm']}")
    looks = [look_of(arm, usual) for arm in arms.iter_rows(named=True)]
    known = {
        "multi-head attention": MHA,
        "attention experts": MOA,
        "k = E: selects nothing": DENSE,
        "other routing": OTHER,
    }
    legend(figure, {name: look for name, look in known.items() if look in looks})
    return figure


FIGURES = {"differences": differences, "curves": curves, "throughput": throughput}
