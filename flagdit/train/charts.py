"""Line charts as inline SVG for the report: complete without a script, in the colours of the page's theme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from flagdit.train.display import quantity

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend; empty for a line that another one explains (raw values behind a smoothed line).
        points: (x, y), in order of x; y is finite.
        color: number of a theme colour, from 1.
        faint: drawn thin and pale.
        dots: every point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 1
    faint: bool = False
    dots: bool = False


def smoothed(points: Sequence[tuple[float, float]], span: float = 0.03) -> list[tuple[float, float]]:
    """Bias-corrected exponential smoothing over about `span` of the points."""
    keep = 1 - 1 / max(1.0, span * len(points))
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def line_chart(series: Sequence[Series], *, log: bool | None = None, unit: str = "", zero: bool = False) -> Markup:
    """An SVG of lines over steps; empty when there is nothing to draw.

    Args:
        series: lines, drawn in order.
        log: logarithmic y axis; None: where all values are positive and span more than a factor of 8.
        unit: after the values that the pointer shows.
        zero: the y axis begins at zero.
    """
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if zero:
        ys.append(0.0)
    if log is None:
        log = min(ys) > 0 and max(ys) / min(ys) > 8
    x_axis, y_axis = _Axis(min(xs), max(xs), False), _Axis(min(ys), max(ys), log)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x_axis.share(x) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [_grid(x_axis, y_axis, place)]
    shown = []
    for s in series:
        thin = _thinned(s.points)
        path = " ".join(f"{x},{y}" for x, y in (place(*p) for p in thin))
        parts.append(f'<polyline class="line c{s.color}{" faint" if s.faint else ""}" points="{path}"/>')
        if s.dots or len(thin) == 1:
            parts += [
                f'<circle class="dot c{s.color}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in (place(*p) for p in thin)
            ]
        if s.name:
            points = [[*place(*p), p[0], f"{p[1]:.4g}"] for p in thin]
            shown.append({"name": s.name, "color": s.color, "points": points, "unit": unit})
    data = escape(json.dumps(shown, separators=(",", ":")))
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-series="{data}">{"".join(parts)}</svg>'
    return Markup(svg)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MOST_POINTS points: the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(len(points) / (MOST_POINTS // 2))
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


class _Axis:
    """Maps values to 0…1 and knows round values to label."""

    def __init__(self, low: float, high: float, log: bool):
        self.log = log
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
            self.ticks = _log_ticks(low, high)
        else:
            if low == high:
                low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
            self.low, self.high = low, high
            self.ticks = _round_ticks(low, high)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def share(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def _round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _grid(x_axis: _Axis, y_axis: _Axis, place) -> str:
    parts = []
    floor = HEIGHT - BOTTOM
    for value in y_axis.ticks:
        y = place(10**x_axis.low if x_axis.log else x_axis.low, value)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{_label(value)}</text>')
    for value in x_axis.ticks:
        x = round(LEFT + x_axis.share(value) * (WIDTH - LEFT - RIGHT), 1)
        parts.append(f'<text class="tick" x="{x}" y="{floor + 18}" text-anchor="middle">{_label(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return quantity(value)
    if abs(value) < 0.0001:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}"
