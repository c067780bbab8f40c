"""Figures across models: a line for each model along relative depth, a panel for each matrix or corpus."""

import math

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_atlas.errors import AtlasError
from moe_atlas.plotting.arrays import pages_of
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.claims import claims
from moe_atlas.plotting.measures import measures
from moe_atlas.plotting.registry import COMPARISON_TITLES, COMPARISONS
from moe_atlas.plotting.style import COLOURS, LINES, MARKERS, WIDTH, add_axes, heading, new_figure, span, widen

_MOST_CORPORA = 4
_SUBTITLES = {
    "weight_similarity": "Mean cosine of pairs of routed experts; independent weights have 0",
    "neuron_matching": "Mean over pairs of routed experts: cosine once their neurons are matched, minus that of "
    "independent experts, and tau of the order; joint: up, act and down in one order",
    "projection": "Share of the variance on the first principal component, minus that of independent weights: 0 is "
    "chance; points are experts or neurons (shaded: ±1.96 sd)",
    "router_regression": "Pearson r of router similarity with mean-neuron similarity over pairs of experts, "
    "with its 95 % interval; chance is 0",
    "output_similarity": "Mean angular similarity of the outputs of pairs of routed experts; orthogonal is 0.5",
    "norm_score": "Share of tokens; ranks of output norm and router score; dotted: chance 1/N",
    "load_balance": "Even load has entropy 1 and MaxVio 0 (MaxVio: largest load over the even load, minus 1)",
    "top_score": "Mean routing weight the model applied to the first and to the second choice of a token",
    "specialization": "Values minus chance, of context independence and vocabulary minus the value of a random router, "
    "with 95 % intervals over documents",
    "claims": "Estimate, its value under the null, and its 95 % interval; docs/reproduction.md has the rule",
    "saturation": "Choices of each model beside those of the last model of its series, with 95 % intervals and chance",
}

_NOTHING = {"saturation": "No models with experts share a series in the models sheet: there is nothing to compare."}

# Attention experts beside a model's FFN experts, in the model's colour.
_ATTENTION = {"linestyle": (0, (2.5, 1.2)), "markerfacecolor": "white"}
_BESIDE = 0.012  # relative depth between the intervals of two models


def compare(
    name: str,
    frames: dict[str, pl.DataFrame],
    checkpoints: dict[str, dict] | None = None,
    corpora: list[str] | None = None,
) -> Figure:
    """The comparison `name` from the tables of all models.

    `corpora` chooses and orders the panels by corpus; without it the corpora with the most tokens are drawn,
    at most four. Raises AtlasError for an unknown name, a missing table or a corpus the tables lack.
    """
    if name not in COMPARISONS:
        raise AtlasError(f"{name}: there is no such comparison; the comparisons are {', '.join(COMPARISONS)}.")
    missing = [table for table in COMPARISONS[name] if table not in frames]
    if missing:
        raise AtlasError(f"{name}: the tables {', '.join(missing)} are missing; name them with --table.")
    table = frames[COMPARISONS[name][0]]
    title, subtitle = COMPARISON_TITLES[name], _SUBTITLES[name]
    if name == "claims":
        return claims(table, title, subtitle, corpora)
    if table.is_empty():
        return sentence(title, _NOTHING.get(name, "No model in the tables has experts: there is nothing to compare."))
    if "corpus" in table.columns:
        sizes = tokens_by_corpus(table)
        unknown = [corpus for corpus in corpora or [] if corpus not in sizes]
        if unknown:
            raise AtlasError(f"{name}: no row of the corpora {', '.join(unknown)}; the tables have {', '.join(sizes)}.")
        columns = corpora or list(sizes)[:_MOST_CORPORA]
        heads = {corpus: f"{corpus}\n({sizes[corpus]:,} tokens)" for corpus in columns}
        frames = {**frames, COMPARISONS[name][0]: table.filter(pl.col("corpus").is_in(columns))}
    else:
        columns = ["up", "act", "down"] + ["joint"] * (name == "neuron_matching")
        heads = {matrix: matrix for matrix in columns}
    numbers = measures(name, frames, checkpoints)
    if name in ("weight_similarity", "neuron_matching") and numbers["null_sd"].is_not_null().any():
        subtitle += " (shaded: ±1.96 sd of one pair)"
    models = table["model"].unique(maintain_order=True).to_list()  # one colour a model in every comparison
    return _grid(numbers, title, subtitle, heads, models)


def tokens_by_corpus(table: pl.DataFrame) -> dict[str, int]:
    """Most tokens that any model has of each corpus, the largest corpus first."""
    if "tokens" in table.columns and "rank" in table.columns:
        first = (
            table.filter(pl.col("rank") == 0).group_by("model", "corpus", "layer", "site").agg(pl.col("tokens").sum())
        )
    elif "tokens" in table.columns:
        first = table.select("corpus", "tokens")
    else:  # rank_counts: each token is counted once for each norm rank
        first = table.filter(pl.col("norm_rank") == 0)
        first = first.group_by("model", "corpus", "layer", "site").agg(pl.col("count").sum().alias("tokens"))
    most = first.group_by("corpus").agg(pl.col("tokens").max()).sort(["tokens", "corpus"], descending=[True, False])
    return {corpus: round(tokens) for corpus, tokens in most.iter_rows()}


def _grid(numbers: pl.DataFrame, title: str, subtitle: str, heads: dict[str, str], models: list[str]) -> Figure:
    rows = list(dict.fromkeys(numbers["row"]))
    has_attention = (numbers["site"] == "attention").any()
    left, gap, head, height, between = 0.72, 0.14, 0.82, 1.45, 0.2
    width = (WIDTH - left - 0.12 - gap * (len(heads) - 1)) / max(len(heads), 2)
    entries = len(models) + has_attention
    legend_columns = min(4, entries)
    legend = 0.17 * math.ceil(entries / legend_columns) + 0.1
    figure = new_figure(WIDTH, head + len(rows) * (height + between) + 0.3 + legend)
    heading(figure, title, subtitle)
    for i, row in enumerate(rows):
        part = numbers.filter(pl.col("row") == row)
        limits = _limits(part)
        for j, column in enumerate(heads):
            axes = add_axes(figure, left + j * (width + gap), head + i * (height + between), width, height)
            _panel(axes, part.filter(pl.col("column") == column), models)
            axes.set(xlim=(-0.04, 1.04), ylim=limits, xticks=[0, 0.5, 1])
            axes.locator_params(axis="y", nbins=5)
            if i == 0:
                axes.set_title(heads[column])
            if j == 0:
                axes.set_ylabel(row)
            else:
                axes.tick_params(labelleft=False)
            if i == len(rows) - 1:
                axes.set_xticklabels(["0", "0.5", "1"])
                axes.set_xlabel("relative depth")
            else:
                axes.tick_params(labelbottom=False)
    handles = [Line2D([], [], label=model, **_style(model, models)) for model in models]
    if has_attention:
        handles.append(Line2D([], [], color="0.3", marker="o", markersize=4, label="attention experts", **_ATTENTION))
    figure.legend(handles=handles, loc="lower left", ncols=legend_columns, bbox_to_anchor=(0.02, 0.0), handlelength=3)
    return figure


def _style(model: str, models: list[str]) -> dict:
    i = models.index(model)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[(i // len(COLOURS)) % len(LINES)],
        "markersize": 4,
    }


def _panel(axes, part: pl.DataFrame, models: list[str]) -> None:
    chances = sorted(set(part["chance"].drop_nulls()))
    for chance in chances:
        axes.axhline(
            chance, color="0.45", linestyle=":" if len(chances) > 1 or 0 < chance < 0.5 else "--", linewidth=0.8
        )
    if len(chances) > 1:
        for chance in chances:
            axes.annotate(
                _level(chance), (1.0, chance), textcoords="offset points", xytext=(2, 1), fontsize=7,
                ha="right", color="0.35",
            )  # fmt: skip
    for (model, site), line in pages_of(part, ("model", "site")).items():
        line = line.sort("layer")
        style = _style(model, models)
        if site == "attention":
            style |= _ATTENTION
        depth = line["depth"].to_numpy()
        if line["low"].is_not_null().all():  # side by side, so that no interval hides another
            depth = depth + _BESIDE * (models.index(model) - (len(models) - 1) / 2)
        axes.plot(depth, line["value"].to_numpy(), **style)
        if line["low"].is_not_null().all():
            axes.vlines(depth, line["low"].to_numpy(), line["high"].to_numpy(), color=style["color"], linewidth=0.7)
        if line["null_sd"].is_not_null().all():
            room = 1.96 * line["null_sd"].to_numpy()
            axes.fill_between(depth, -room, room, color=style["color"], alpha=0.15, linewidth=0)


def _level(chance: float) -> str:
    """1/8 where a level is one over a whole number, else two digits."""
    whole = round(1 / chance) if chance > 0 else 0
    return f"1/{whole}" if whole and abs(whole * chance - 1) < 1e-9 else f"{chance:.2g}"


def _limits(part: pl.DataFrame) -> tuple[float, float]:
    """One vertical range for a row of panels: values, intervals and chance levels, with some room."""
    columns = [part[name].drop_nulls().to_numpy() for name in ("value", "low", "high", "chance")]
    null = 1.96 * part["null_sd"].drop_nulls().to_numpy()
    columns += [null, -null]
    low, high = widen(*span(pl.concat([pl.Series(column, dtype=pl.Float64) for column in columns]).to_numpy()))
    return low - 0.07 * (high - low), high + 0.07 * (high - low)
