"""Names beside points, where nothing else is drawn."""

import itertools
import math
from collections.abc import Sequence

from matplotlib.transforms import Bbox

_MARKER, _BAR = 3.5, 1.0  # half widths in points, with some air
_DISTANCES = (5, 11, 18, 27, 38, 52, 68)
_DIRECTIONS = [math.radians(angle) for angle in (0, 180, 20, -20, 160, -160, 45, -45, 135, -135, 80, -80, 100, -100)]
_LEADER = 10  # from this many points on a line leads to the point


def place_labels(
    axes,
    names: Sequence[tuple[float, float, str, str]],
    bars: Sequence[tuple[float, float, float]] = (),
    others: Sequence[tuple[float, float]] = (),
) -> list:
    """Write each name beside its point (x, y, name, colour) so that it covers no point, bar (x, low, high) or name.

    others: points without a name. The limits of the axes must be set. Of all places around a point the one that covers
    least is taken, the nearest first, and none that is nearer to another point; from far a thin line leads to the
    point. Returns the annotations.
    """
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    where = axes.transData.transform
    marks = [(x, y) for x, y, *_ in names] + list(others)
    middles = [where(mark) for mark in marks]
    taken = [_around(*where((x, y)), _MARKER * scale, _MARKER * scale) for x, y in marks]
    for x, low, high in bars:
        (left, bottom), (_, top) = where((x, low)), where((x, high))
        taken.append(Bbox([[left - _BAR * scale, bottom], [left + _BAR * scale, top]]))
    frame = axes.get_window_extent(renderer)
    found, written = [], []
    for x, y, name, colour in sorted(names, key=lambda point: (point[1], point[0])):
        options = {"textcoords": "offset points", "fontsize": 7, "annotation_clip": False, "color": colour}
        text = axes.annotate(name, (x, y), (0, 0), **options)
        size = text.get_window_extent(renderer)
        at = where((x, y))
        best = None
        for distance, angle in itertools.product(_DISTANCES, _DIRECTIONS):
            middle = _middle(at, size, distance * scale, angle)
            box = _around(*middle, size.width / 2, size.height / 2)
            cost = sum(_covered(box, other) for other in taken) + sum(4 * _covered(box, other) for other in written)
            cost += 6 * (size.width * size.height - _covered(box, frame))
            own = _away(box, at)
            cost += 20 * scale**2 * sum(_away(box, other) < 0.9 * own for other in middles)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, distance, middle, box)
            if cost < 1e-6:
                break
        _, distance, middle, box = best
        offset = ((middle[0] - at[0]) / scale, (middle[1] - at[1]) / scale)
        text.set(ha="center", va="center", position=offset)
        if distance >= _LEADER:
            line = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
            text.remove()
            text = axes.annotate(name, (x, y), offset, ha="center", va="center", arrowprops=line, **options)
        written.append(box)
        found.append(text)
    return found


def _middle(at: tuple[float, float], size: Bbox, distance: float, angle: float) -> tuple[float, float]:
    """Middle of a text whose box's nearest edge is this far from the point."""
    across, up = math.cos(angle), math.sin(angle)
    side = 0.0 if abs(across) < 0.3 else math.copysign(size.width / 2, across)
    return at[0] + distance * across + side, at[1] + distance * up + size.height / 2 * up


def _around(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox([[x - width, y - height], [x + width, y + height]])


def _away(box: Bbox, point: tuple[float, float]) -> float:
    """Distance of a point from a box; 0 inside."""
    across = max(box.x0 - point[0], 0.0, point[0] - box.x1)
    return math.hypot(across, max(box.y0 - point[1], 0.0, point[1] - box.y1))


def _covered(a: Bbox, b: Bbox) -> float:
    """Area that both boxes have."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0
