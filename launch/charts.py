"""Charts as inline SVG that the page sizes and colours: sharp on a phone and on a wall, in light and in dark.

Across, positions are percentages of the plotting area and, down, pixels: the text keeps its size at every width. Margins,
colours (`k0`, `k1` ... for the series, told apart by their mark as well) and fonts are in report.html.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

Point = tuple[float, float]
Interval = tuple[float, float, float]  # value, low, high

SERIES = 4  # so many are told apart by colour and mark


class Area:
    """A plotting area of `height` pixels over the ranges `x` and `y`; shapes are added to it and `svg` closes it."""

    def __init__(self, x: Point, y: Point, height: int, log: bool = False) -> None:
        self.x, self.y, self.height, self.log = x, y, height, log
        self.parts: list[str] = []

    def across(self, x: float) -> float:
        """Percent from the left."""
        low, high, x = (math.log(v) for v in (*self.x, x)) if self.log else (*self.x, x)
        return 100 * (x - low) / (high - low)

    def down(self, y: float) -> float:
        """Pixels from the top."""
        return self.height * (1 - (y - self.y[0]) / (self.y[1] - self.y[0]))

    def line(self, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
        """A line from percent and pixels to percent and pixels."""
        self.parts.append(f'<line class="{name}" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, words: str, name: str = "", dx: float = 0) -> None:
        """Words at percent and pixels, moved by `dx` pixels."""
        place = f'x="{x:.2f}%" y="{y:.1f}" dx="{dx:g}" dy=".35em"'
        self.parts.append(f'<text class="{name}" {place}>{html.escape(words)}</text>')

    def mark(self, x: float, y: float, series: int, words: str = "") -> None:
        """The mark of a series, with words for the mouse."""
        self.parts.append(f'<svg x="{x:.2f}%" y="{y:.1f}">{_sign(series, words)}</svg>')

    def path(self, points: Iterable[Point], series: int | None) -> None:
        """A line through points of the data; of no series (None) it stays behind those of the others."""
        places = " ".join(f"{self.across(x):.2f},{self.down(y):.1f}" for x, y in points)
        # A box of its own is stretched to the page, so that percentages can be joined to a line.
        box = f'<svg width="100%" height="{self.height}" viewBox="0 0 100 {self.height}" preserveAspectRatio="none">'
        name = "rest" if series is None else f"k{series % SERIES}"
        self.parts.append(f'{box}<polyline class="path {name}" points="{places}"/></svg>')

    def axes(self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> None:
        """Grid, ticks, and what the axes are; without `y_label` only the horizontal axis."""
        for tick in x_ticks if x_ticks is not None else ticks(*self.x):
            self.line(self.across(tick), 0, self.across(tick), self.height, "grid")
            self.text(self.across(tick), self.height + 14, number(tick), "tick middle")
        self.text(100, self.height + 32, x_label, "label end")
        if y_label:
            for tick in ticks(*self.y):
                self.line(0, self.down(tick), 100, self.down(tick), "grid")
                self.text(0, self.down(tick), number(abs(tick)), "tick end", -8)
            self.text(0, -16, y_label, "label", -40)

    def svg(self, words: str, name: str = "", margin: float = 0) -> str:
        """The finished picture; `words` tell it to those who do not see it, `margin` is the letters of row labels."""
        style = f' style="--letters: {margin:g}"' if margin else ""
        head = f'<svg role="img" aria-label="{html.escape(words)}" width="100%" height="{self.height}">'
        return f'<div class="plot {name}"{style}>{head}{"".join(self.parts)}</svg></div>'


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval | None]]], series: Sequence[str], x_label: str) -> str:
    """Values with their intervals, one row a label, the series below each other, from 0 to 100."""
    apart = 16
    step = apart * len(series) + 24  # on a phone the label stands above the marks
    area = Area((0, 100), (0, 1), step * len(rows))
    area.axes(x_label, "")
    for i, (label, values) in enumerate(rows):
        area.line(0, i * step, 100, i * step, "grid")
        area.text(0, (i + 0.5) * step, label, "row", -12)
        for s, found in enumerate(values):
            if found is None:
                continue
            (value, low, high), y = found, (i + 0.5) * step + (s - (len(series) - 1) / 2) * apart
            area.line(low, y, high, y, f"path k{s % SERIES}")
            area.mark(value, y, s, f"{label}, {series[s]}: {value:.1f} [{low:.1f}, {high:.1f}]")
            area.text(high, y, f"{value:.1f}", "value", 7)
    words = f"{x_label} of {', '.join(label for label, _ in rows)}; the numbers are in the table"
    return legend(series) + area.svg(words, "rows", max((len(label) for label, _ in rows), default=0))


def cost_chart(points: Sequence[tuple[str, float, float]], series: int, y: Point, labels: tuple[str, str]) -> str:
    """(name, cost, value) as marks with their names, over cost on a logarithmic axis."""
    costs = [cost for _, cost, _ in points]
    x = (min(costs) / 1.6, max(costs) * 1.6)
    height = max(260, 16 * len(points) + 20)
    area = Area(x, y, height, log=True)
    area.axes(*labels, log_ticks(*x))
    # On a phone names from both sides meet, so that they are kept apart together.
    places = spread([area.down(value) for _, _, value in points], 15, height)
    for (name, cost, value), place in zip(points, places, strict=True):
        at, left = area.down(value), area.across(cost) < 50
        side = 1 if left else -1
        leader = f'<line class="leader" x1="{6 * side}" y1="{at:.1f}" x2="{18 * side}" y2="{place:.1f}"/>'
        area.parts.append(f'<svg x="{area.across(cost):.2f}%">{leader}</svg>')
        area.text(area.across(cost), place, name, "value" if left else "value end", 22 * side)
        area.mark(area.across(cost), at, series, f"{name}: {value:.1f} for {number(cost)}")
    return area.svg(f"{labels[1]} over {labels[0]}: " + ", ".join(f"{n} {v:.1f}" for n, _, v in points))


def line_chart(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Lines with their last value."""
    every = [p for points in lines.values() for p in points]
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v)) for v in zip(*every, strict=True))
    pad = 0.06 * (y_high - y_low) or 0.1 * abs(y_high) or 1.0
    area = Area((x_low, x_high if x_high > x_low else x_low + 1), (y_low - pad, y_high + pad), 170)
    area.axes(x_label, y_label)
    places = spread([area.down(points[-1][1]) for points in lines.values()], 14, area.height)
    for s, (points, place) in enumerate(zip(lines.values(), places, strict=True)):
        area.path(points, s)
        area.mark(area.across(points[-1][0]), area.down(points[-1][1]), s)
        area.text(100, place, f"{points[-1][1]:.3g}", "value", 8)
    words = "; ".join(f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in lines.items())
    return area.svg(f"{y_label} over {x_label}: {words}")


def pool_chart(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Lines over the number of samples, on a logarithmic axis, with their last value; in percent."""
    every = [p for points in lines.values() for p in points]
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v)) for v in zip(*every, strict=True))
    pad = 0.06 * (y_high - y_low) or 1.0
    area = Area((x_low, max(x_high, 2 * x_low)), (max(0.0, y_low - pad), min(102.0, y_high + pad)), 220, log=True)
    area.axes(x_label, y_label, sorted({x for x, _ in every}))
    places = spread([area.down(points[-1][1]) for points in lines.values()], 14, area.height)
    for s, (points, place) in enumerate(zip(lines.values(), places, strict=True)):
        area.path(points, s)
        for x, y in points:
            area.mark(area.across(x), area.down(y), s)
        area.text(100, place, f"{points[-1][1]:.1f}", "value", 10)
    words = "; ".join(f"{name} from {p[0][1]:.1f} to {p[-1][1]:.1f}" for name, p in lines.items())
    return area.svg(f"{y_label} over {x_label}: {words}")


def curve_chart(lines: Mapping[str, Sequence[Point]], labels: tuple[str, str]) -> str:
    """Lines over a logarithmic axis, in percent, each with its name at its end: more of them than there are colours."""
    every = [p for points in lines.values() for p in points]
    costs, values = [x for x, _ in every], [y for _, y in every]
    x = (min(costs) / 1.3, max(costs) * 1.3)
    pad = max(2.0, 0.08 * (max(values) - min(values)))
    area = Area(
        x, (max(0.0, min(values) - pad), min(102.0, max(values) + pad)), max(280, 16 * len(lines) + 40), log=True
    )
    area.axes(*labels, log_ticks(*x))
    places = spread([area.down(points[-1][1]) for points in lines.values()], 15, area.height)
    for s, ((name, points), place) in enumerate(zip(lines.items(), places, strict=True)):
        area.path(points, s)
        for cost, value in points:
            words = f"{name}: {value:.1f} for {number(cost)}"
            area.mark(area.across(cost), area.down(value), s, words)
        end, at = area.across(points[-1][0]), area.down(points[-1][1])
        side = 1 if end < 60 else -1
        leader = f'<line class="leader" x1="{6 * side}" y1="{at:.1f}" x2="{18 * side}" y2="{place:.1f}"/>'
        area.parts.append(f'<svg x="{end:.2f}%">{leader}</svg>')
        area.text(end, place, name, "value" if side > 0 else "value end", 22 * side)
    words = "; ".join(f"{name} from {p[0][1]:.1f} to {p[-1][1]:.1f}" for name, p in lines.items())
    return area.svg(f"{labels[1]} over {labels[0]}: {words}")


def apart_charts(
    lines: Mapping[str, Sequence[tuple[float, Interval]]], reference: str, labels: tuple[str, str]
) -> dict[str, str]:
    """Name -> a chart of this line with its intervals before all others, of which only the reference is told by its colour.

    For more lines than there are colours: (cost, value with interval) over a logarithmic axis, in percent, on axes that all
    charts share.
    """
    every = [p for points in lines.values() for p in points]
    costs = [x for x, _ in every]
    x = (min(costs) / 1.3, max(costs) * 1.3)
    y = (max(0.0, min(low for _, (_, low, _) in every) - 3), min(102.0, max(high for _, (_, _, high) in every) + 3))
    made = {}
    for name, points in lines.items():
        area = Area(x, y, 150, log=True)
        area.axes(*labels, log_ticks(*x))
        plain = {other: [(cost, value) for cost, (value, _, _) in some] for other, some in lines.items()}
        for other in plain:
            if other not in (name, reference):
                area.path(plain[other], None)
        if reference in plain and reference != name:
            area.path(plain[reference], 1)
        series = 1 if name == reference else 0
        for cost, (_, low, high) in points:
            area.line(area.across(cost), area.down(low), area.across(cost), area.down(high), f"path thin k{series}")
        area.path(plain[name], series)
        for cost, (value, low, high) in points:
            words = f"{name}: {value:.1f} [{low:.1f}, {high:.1f}] for {number(cost)}"
            area.mark(area.across(cost), area.down(value), series, words)
        cost, (value, _, _) = points[-1]
        area.text(area.across(cost), area.down(value), f"{value:.1f}", "value", 9)
        told = "; ".join(
            f"{value:.1f} [{low:.1f}, {high:.1f}] for {number(cost)}" for cost, (value, low, high) in points
        )
        made[name] = area.svg(f"{labels[1]} over {labels[0]}: {name} {told}")
    return made


def reliability_chart(bins: Sequence[tuple[float, Interval]], labels: tuple[str, str]) -> str:
    """(score, share with interval) against the diagonal on which a score is the share it foretells."""
    area = Area((0, 1), (0, 1), 260)
    area.axes(*labels)
    area.line(0, area.height, 100, 0, "leader")
    area.path([(score, value) for score, (value, _, _) in bins], 1)
    for score, (value, low, high) in bins:
        x = area.across(score)
        area.line(x, area.down(low), x, area.down(high), "path k1")
        area.mark(x, area.down(value), 1, f"score {score:.2f}: {value:.2f} [{low:.2f}, {high:.2f}]")
    return area.svg(f"{labels[1]} over {labels[0]}: " + ", ".join(f"{s:.2f} {v[0]:.2f}" for s, v in bins))


def mirror_chart(up: Sequence[float], down: Sequence[float], names: tuple[str, str], labels: tuple[str, str]) -> str:
    """Two histograms over [0, 1] on one axis, the second upside down, each with its name."""
    top = 1.25 * max(*up, *down, 1e-9)
    area = Area((0, 1), (-top, top), 260)
    area.axes(*labels)
    for s, heights in ((1, up), (0, down)):
        for i, height in enumerate(heights):
            y, tall = (area.down(height) if s else area.down(0)), area.down(0) - area.down(height)
            place = f'x="{100 * i / len(heights) + 0.3:.2f}%" width="{100 / len(heights) - 0.6:.2f}%"'
            area.parts.append(f'<rect class="bar k{s}" {place} y="{y:.1f}" height="{tall:.1f}"/>')
    area.text(1, 10, names[0], "value")
    area.text(1, area.height - 10, names[1], "value")
    return area.svg(f"{labels[1]} over {labels[0]}, {names[0]} above, {names[1]} below")


def legend(series: Sequence[str]) -> str:
    """The marks of the series with their names."""
    signs = (
        f'<svg width="14" height="12" viewBox="-7 -6 14 12" aria-hidden="true">{_sign(s)}</svg>'
        for s in range(len(series))
    )
    return (
        '<p class="legend">'
        + "".join(f"<span>{g} {html.escape(n)}</span>" for g, n in zip(signs, series, strict=True))
        + "</p>"
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high], at most `most` and a step apart that is 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with numbers between them where they are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [m * 10.0**e for e in powers for m in steps if low <= m * 10.0**e <= high]
        if len(found) >= 3:
            break
    return found


def number(value: float) -> str:
    """A tick or a cost in few letters: 0.05, 3, 20k, 5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def spread(places: Sequence[float], apart: float, height: float) -> list[float]:
    """The places moved no more than they must to lie `apart` from each other, inside [0, height] if they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved: list[float] = []
    for rank, i in enumerate(order):
        moved.append(max(places[i], moved[rank - 1] + apart if rank else 0.0))
    below = height
    for rank in reversed(range(len(order))):
        moved[rank] = min(moved[rank], below)
        below = moved[rank] - apart
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = moved[rank]
    return found


def _sign(series: int, words: str = "") -> str:
    title = f"<title>{html.escape(words)}</title>" if words else ""
    shapes = (
        f'<circle r="4.5" class="hollow k0">{title}</circle>',
        f'<circle r="5" class="full k1">{title}</circle>',
        f'<rect x="-4.5" y="-4.5" width="9" height="9" class="full k2">{title}</rect>',
        f'<path d="M0-6 6 0 0 6-6 0Z" class="hollow k3">{title}</path>',
    )
    return shapes[series % SERIES]
