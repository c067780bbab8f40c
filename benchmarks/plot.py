"""Draw what the runs left: seconds of each run of each contender, a panel a case, with the floors of the machine."""

import argparse
import textwrap
from pathlib import Path

import polars as pl
import seaborn
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import report
from moe_atlas.plotting import style

_ROW, _LEAST, _TOP, _BETWEEN = 0.24, 0.7, 0.75, 0.65  # inches
_LEFT, _RIGHT = 1.35, 1.3
_FLOORS = {"floor: disk": ("floor_disk", "--"), "floor: arithmetic": ("floor_arithmetic", ":")}
_APART = 0.08  # rows between cold and warm


def draw(frame: pl.DataFrame, path: Path) -> None:
    """Write the figure of all rows (plan.SCHEMA) as png and beside it as pdf; none where there are none."""
    cases = report.cases(frame)
    if not cases:
        return
    heights = [max(_LEAST, part["contender"].n_unique() * _ROW) for part in cases]
    height = _TOP + sum(heights) + len(cases) * _BETWEEN
    figure, top = style.new_figure(style.WIDTH, height), _TOP
    machines = "; ".join(dict.fromkeys(report.machine(part.row(0, named=True)) for part in cases))
    style.heading(figure, "What the work takes, beside what else could be taken", f"seconds of each run\n{machines}")
    for part, inches in zip(cases, heights, strict=True):
        axes = style.add_axes(figure, _LEFT, top, style.WIDTH - _LEFT - _RIGHT, inches)
        _panel(axes, part)
        top += inches + _BETWEEN
    for suffix in (".png", ".pdf"):
        style.save(figure, path.with_suffix(suffix))


def _panel(axes, part: pl.DataFrame) -> None:
    names, first = part["contender"].unique(maintain_order=True).to_list(), part.row(0, named=True)
    places = {name: place for place, name in enumerate(names)}
    ran = part.drop_nulls("seconds").with_columns(
        files=pl.when("cold").then(pl.lit("cold")).otherwise(pl.lit("warm")),
        place=pl.col("contender").replace_strict(places) + pl.when("cold").then(-_APART).otherwise(_APART),
    )
    colours = {name: style.COLOURS[place % len(style.COLOURS)] for place, name in enumerate(names)}
    seaborn.scatterplot(
        ran.to_pandas(), x="seconds", y="place", hue="contender", palette=colours, style="files",
        markers={"cold": "o", "warm": "X"}, s=28, linewidth=0.3, ax=axes,
    )  # fmt: skip
    for label, (name, line) in _FLOORS.items():
        if first[name]:
            axes.axvline(first[name], linestyle=line, color="0.35", label=label)
    for name, said in part.drop_nulls("failed").select("contender", "failed").unique().iter_rows():
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": style.SMALLEST_FONT}
        axes.text(0.01, names.index(name), f"failed: {textwrap.shorten(said, 60)}", **place)
    axes.set(xscale="log", xlabel="seconds", ylabel="", ylim=(len(names) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _place: f"{seconds:g}"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 1.2)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_title(report.title(first), loc="left")
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    shown = {label: by_label[label] for label in ("cold", "warm", *_FLOORS) if label in by_label}
    axes.legend(shown.values(), shown.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.05))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("results/benchmarks"), help="of the tables and the figure")
    arguments = parser.parse_args()
    draw(report.read(arguments.folder), arguments.folder / "benchmarks.png")


if __name__ == "__main__":
    main()
