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
_EMOE = "emoe"
# The arm whose shape, layers and share of the data are varied, and its baseline: LoRA where nothing is tuned in full.
_VARIED = ((_EMOE, "dense"), ("lora-emoe", "lora"))


def _look(number: int) -> dict:
    marker = MARKERS[number % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4, "linestyle": ""}


def _study(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """Rows of the study that varies this; of all studies where there is none of its name."""
    own = table.filter(pl.col("study") == name)
    return table if own.is_empty() else own


def _tests(table: pl.DataFrame) -> list[str]:
    """The reported tests; validation is what learning rates were chosen by."""
    return [test for test in table["test"].unique(maintain_order=True) if test != "validation"]


def _differences(frames: dict[str, pl.DataFrame], study: str) -> pl.DataFrame:
    table = _study(frames["emoe_differences"], study)
    return table.rename({"difference": "value"}).filter(pl.col("test") != "validation")


def _main(table: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """Rows of each arm with one value of each column: that of the arm emoe, where the arm has it; nulls are kept."""
    for column in columns:
        common = _most_frequent(table.filter(pl.col("arm") == _EMOE)[column])
        parts = []
        for part in table.partition_by("arm", maintain_order=True):
            value = common if common in part[column] else _most_frequent(part[column])
            parts.append(part.filter(pl.col(column).is_null() | pl.col(column).eq_missing(pl.lit(value))))
        table = pl.concat(parts) if parts else table
    return table


def _varied(table: pl.DataFrame) -> tuple[str, str]:
    """The first pair of _VARIED whose arm with experts is in the table."""
    return next((pair for pair in _VARIED if pair[0] in table["arm"]), _VARIED[0])


def _against(table: pl.DataFrame, arm: str, baseline: str) -> pl.DataFrame:
    """Rows of one arm less one baseline."""
    return table.filter(pl.col("arm") == arm, pl.col("baseline") == baseline)


def _most_frequent(values: pl.Series) -> object:
    """The value that comes most often, the first of equals; None where there is none."""
    counts = values.drop_nulls().value_counts(sort=True)
    most = counts.filter(pl.col("count") == pl.col("count").max())[values.name].to_list()
    return next((value for value in values if value in most), None)


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
    width = (WIDTH - left - 0.16 - _GAP * (len(tasks) - 1)) / max(len(tasks), 2)
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
    table = _differences(frames, "arms")
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
        if table["metric"].n_unique() == 1:
            axes.set_xlim(limits_of(table, 0.0))
        axes.locator_params(axis="x", nbins=5, prune="both")

    subtitle = f"Difference of the metric: {_INTERVAL}; {seeds} seeds{_shapes(table)}"
    return _grid(title_of("arms", model), subtitle, table, draw, 0.17 * len(pairs) + 0.15, left=2.1, shared=False)


def _shapes(table: pl.DataFrame) -> str:
    """N and k of the arms with experts: those of most, then those of single arms that have their own."""
    shapes = table.filter(pl.col("experts").is_not_null()).select("arm", "experts", "k").unique(maintain_order=True)
    if shapes.is_empty():
        return ""
    counts = shapes.group_by("experts", "k", maintain_order=True).agg(pl.col("arm"), pl.len())
    texts = []
    for row in counts.sort("len", descending=True, maintain_order=True).iter_rows(named=True):
        of = f" of {', '.join(row['arm'])}" if texts else ""
        texts.append(f"N\u00a0=\u00a0{row['experts']}, k\u00a0=\u00a0{row['k']}{of}")
    return "; " + "; ".join(texts)


def grid(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """EMoE minus its baseline, by the number of experts and the share of them that is chosen."""
    table = _differences(frames, "grid")
    arm, baseline = _varied(table)
    table = _against(table, arm, baseline).filter(pl.col("experts").is_not_null())
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
    subtitle = f"{arm} − {baseline}, difference of the metric: {_INTERVAL}"
    return _grid(title_of("grid", model), subtitle, table, draw, 1.2, handles=handles, label="difference")


def layers(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """EMoE minus its baseline, by which layers have experts."""
    table = _differences(frames, "layers")
    arm, baseline = _varied(table)
    table = _against(table, arm, baseline).filter(pl.col("layers").is_not_null())
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
    subtitle = f"{arm} − {baseline}, difference of the metric: {_INTERVAL}; N = {experts}, k = {k}"
    return _grid(title_of("layers", model), subtitle, table, draw, 1.2, label="difference")


def fraction(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """EMoE and its baseline by the share of the training data; a dot is a seed."""
    runs = _study(frames["emoe_runs"], "fraction").filter(pl.col("chosen") & (pl.col("test") != "validation"))
    runs = runs.filter(~pl.col("test").str.contains("/", literal=True))  # no groups of a test
    with_experts, dense = _varied(runs)
    runs = runs.filter(pl.col("arm").is_in([with_experts, dense]))
    runs = _main(runs, "experts", "k", "layers")
    shares = sorted(runs["fraction"].unique())
    if len(shares) < 2:
        return sentence(title_of("fraction", model), "All models were tuned on the same share of the training data.")
    names = [arm for arm in (dense, with_experts) if arm in set(runs["arm"])]

    def draw(axes, rows: pl.DataFrame, first: bool) -> None:
        for chance in set(rows["chance"].drop_nulls()):
            axes.axhline(chance, color="0.45", linestyle="--", linewidth=0.8)
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
    subtitle = "The metric; a dot is a seed, lines join the means, dashed is chance. emoe_differences has the intervals"
    table = runs.select("task", "test", "arm", "fraction", "value", "chance")
    figure = _grid(
        title_of("fraction", model), subtitle, table, draw, 1.3, handles=handles, label="metric", shared=False
    )
    return figure


def selection(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """Choices of the same tokens at steps of the tuning: of each expert, and how many are those of before it."""
    table = _study(frames["emoe_training_selection"], "arms")
    table = table.filter(pl.col("task") == table["task"][0])
    order = table["arm"].unique(maintain_order=True).to_list()
    shares = table.filter((pl.col("measure") == "share") & (pl.col("seed") == table["seed"].min()))
    parts = list(
        shares.partition_by("arm", "layers", "layer", "experts", "k", as_dict=True, maintain_order=True).items()
    )
    overlaps = table.filter(pl.col("measure") == "overlap_first")
    shown, across = parts[:_MOST_PANELS], 3
    left, gap, height, row_height = 0.6, 0.3, 1.2, 1.75
    width = (WIDTH - left - 0.1 - gap * (across - 1)) / across
    down = -(-len(shown) // across)
    figure = new_figure(WIDTH, _HEAD + down * row_height + 2.65)
    cut = f" (first {len(shown)} of {len(parts)})" if len(parts) > len(shown) else ""
    subtitle = (
        f"Task {table['task'][0]}, the same texts at each step. Above: N × share of the choices, one seed, experts "
        f"sorted by their share before the first step{cut}. Below: share of a token's experts that were its experts "
        "then; mean and range over seeds, dashed: chance"
    )
    heading(figure, title_of("selection", model), subtitle)
    norm = TwoSlopeNorm(1, 0, max(2.0, float((shares["value"] * shares["experts"]).max() or 2.0)))
    image = None
    for number, ((arm, _, layer, experts, k), part) in enumerate(shown):
        row, column = divmod(number, across)
        axes = add_axes(figure, left + column * (width + gap), _HEAD + 0.25 + row * row_height, width, height)
        image = _selection_map(axes, part, experts, norm)
        axes.set_title(f"{arm}, layer {layer}\nN = {experts}, {share_text(k, experts)}")
        if number + across < len(shown):  # the panel below has the label
            axes.set_xlabel("")
        if column == 0:
            axes.set_ylabel("expert")
    if image is not None:
        bar = add_axes(figure, left, _HEAD + down * row_height + 0.1, 2.0, 0.09)
        figure.colorbar(image, cax=bar, orientation="horizontal", label="N × share")
    _overlap_lines(figure, overlaps, order, _HEAD + down * row_height + 0.75, left)
    return figure


def _selection_map(axes, part: pl.DataFrame, experts: int, norm: TwoSlopeNorm):
    """Experts by steps; returns the image."""
    steps = sorted(part["step"].unique())
    shares = np.full((experts, len(steps)), np.nan)
    shares[part["expert"].cast(pl.Int64), [steps.index(step) for step in part["step"]]] = part["value"] * experts
    order = np.argsort(-shares[:, 0], kind="stable")
    image = axes.imshow(shares[order], cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks([])
    places = sorted({0, len(steps) // 2, len(steps) - 1})
    axes.set_xticks(places, [str(steps[place]) for place in places])
    axes.set_xlabel("step")
    return image


def _overlap_lines(figure: Figure, overlaps: pl.DataFrame, order: list[str], top: float, left: float) -> None:
    """A panel for each layer, at most three: the overlap with the choices of before the tuning, a line for each arm."""
    layers = sorted(overlaps["layer"].unique())[-3:]
    width = (WIDTH - left - 0.1 - 0.3 * 2) / 3
    arms_shown = [arm for arm in order if arm in set(overlaps["arm"])]
    for column, layer in enumerate(layers):
        axes = add_axes(figure, left + column * (width + 0.3), top, width, 0.95)
        rows = overlaps.filter(pl.col("layer") == layer)
        for chance in sorted(set(rows["chance"])):  # of copies another than of the others
            axes.axhline(chance, color="0.45", linestyle="--", linewidth=0.8)
        for number, arm in enumerate(arms_shown):
            own = rows.filter(pl.col("arm") == arm).group_by("step").agg(
                pl.col("value").mean(), pl.col("value").min().alias("low"), pl.col("value").max().alias("high")
            ).sort("step")  # fmt: skip
            axes.plot(own["step"].to_numpy(), own["value"].to_numpy(), **(_look(number) | {"linestyle": "-"}))
            axes.fill_between(own["step"], own["low"], own["high"], color=COLOURS[number % len(COLOURS)], alpha=0.15)
        axes.set(ylim=(0, 1.03), title=f"layer {layer}", xlabel="step")
        if column == 0:
            axes.set_ylabel("overlap")
    handles = [Line2D([], [], label=arm, **(_look(i) | {"linestyle": "-"})) for i, arm in enumerate(arms_shown)]
    if handles:
        figure.legend(handles=handles, loc="lower left", ncols=min(len(handles), 4), bbox_to_anchor=(0.02, 0.0))


FIGURES = {"arms": arms, "grid": grid, "layers": layers, "fraction": fraction, "selection": selection}
