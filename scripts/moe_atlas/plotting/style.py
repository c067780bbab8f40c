"""Sizes, colours, layout in inches, visible tokens, and saving with the same bytes every time."""

import functools
import io
import math
import os
import textwrap

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from moe_atlas.files import atomic_path

matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "axes.titlepad": 4,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "xtick.major.size": 2,
        "ytick.major.size": 2,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.pad": 2,
        "ytick.major.pad": 2,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "text.parse_math": False,  # tokens hold dollar signs
    }
)

WIDTH = 6.69  # inches: 17 cm, the text width of a page
DPI = 150
SMALLEST_FONT = 7

# Okabe and Ito's colours, told apart with any colour vision; yellow is too pale for lines and left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
NORM_COLOUR, SCORE_COLOUR = COLOURS[0], COLOURS[5]

_SPACES = {" ": "␣", "▁": "␣", "Ġ": "␣", "\n": "⏎", "Ċ": "⏎", "\t": "⇥", "\r": "␍"}
_EXTRA = {"F_same_input": "F′"}


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, outside pyplot's state."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float, **options):
    """Axes placed in inches from the left and top edges of the figure."""
    total_width, total_height = figure.get_size_inches()
    box = (
        left / total_width,
        (total_height - top - height) / total_height,
        width / total_width,
        height / total_height,
    )
    return figure.add_axes(box, **options)


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """Top left: what it is of, then what is drawn and in which unit, on a second line where it is long."""
    if "\n" not in subtitle:
        whole = subtitle.replace(" %", "\u00a0%")  # a number and its unit stay on one line
        subtitle = textwrap.fill(whole, int(16 * figure.get_figwidth()))  # 16 characters an inch at 8 points
    _, height = figure.get_size_inches()
    figure.text(0.08 / figure.get_figwidth(), 1 - 0.06 / height, title, fontsize=9, fontweight="bold", va="top")
    figure.text(0.08 / figure.get_figwidth(), 1 - 0.25 / height, subtitle, fontsize=8, va="top", color="0.25")


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write png or pdf atomically and without a date, so that the same figure has the same bytes."""
    with atomic_path(path) as temporary:
        if temporary.suffix == ".pdf":
            figure.savefig(temporary, dpi=DPI, metadata={"CreationDate": None})
        else:
            figure.savefig(temporary, dpi=DPI, metadata={"Software": None})


def png(figure: Figure) -> bytes:
    """The figure as png bytes, for notebooks."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points the font can draw."""
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def visible(token: str, length: int = 12) -> str:
    """A token as a label: blanks and line ends shown, glyphs the font lacks as a box, cut at `length` characters."""
    if not token:
        return "∅"
    shown = "".join(_SPACES.get(character, character) for character in token)
    shown = "".join(character if ord(character) in _glyphs() else "□" for character in shown)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def label_text(label: str) -> str:
    """An expert label as a tick: F_same_input is written F′."""
    return _EXTRA.get(label, label)


def thinned(labels: list[str], inches: float, room: float = 0.16) -> tuple[list[int], list[str]]:
    """Positions and texts of the ticks that fit on an axis of this length.

    Numbered experts keep every 1st, 2nd, 4th, 5th, 8th, 10th, ...; the others (F, F′, SE) are
    always kept, and numbers too close to them are dropped.
    """
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128)
    step = next((s for s in steps if math.ceil(len(labels) / s) * room <= inches), len(labels))
    named = [i for i, label in enumerate(labels) if not label.isdigit()]
    clear = room / inches * len(labels)  # labels a tick's text covers
    kept = [
        i
        for i, label in enumerate(labels)
        if label.isdigit() and int(label) % step == 0 and all(abs(i - j) >= min(clear, step) for j in named)
    ]
    if step > 1:  # named labels sit side by side: keep those that do not overlap
        spaced = []
        for i in named:
            if not spaced or i - spaced[-1] >= clear:
                spaced.append(i)
        named = spaced
    positions = sorted(kept + named)
    return positions, [label_text(labels[i]) for i in positions]


def bars(axes, left: np.ndarray, heights: np.ndarray, width: float, colour, base=0.0) -> None:
    """Bars as one collection: a hundred times faster than a patch each. `left`, `heights`: (n,)."""
    base = np.broadcast_to(base, heights.shape)
    right, top = left + width, base + heights
    corners = np.stack([np.stack([left, base], 1), np.stack([left, top], 1)], 1)
    corners = np.concatenate([corners, np.stack([np.stack([right, top], 1), np.stack([right, base], 1)], 1)], 1)
    axes.add_collection(PolyCollection(corners, facecolors=colour, edgecolors="none"), autolim=False)


def bare(axes) -> None:
    """No ticks, thin frame: a panel of an overview."""
    axes.set_xticks([])
    axes.set_yticks([])


def span(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value; (nan, nan) if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)


def widen(low: float, high: float) -> tuple[float, float]:
    """A usable axis range: never empty, never nan."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        room = max(abs(low), 1e-6) * 0.01
        return low - room, high + room
    return low, high


def union(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """The range that holds all finite ones."""
    return span(np.array(ranges, dtype=np.float64).ravel())
