"""Charts as coordinates in an SVG image, which the page's template draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 14, 14, HEIGHT - 42  # the plot's edges
LOG_FROM = 12  # an axis is logarithmic if its largest value is this many times the smallest
LETTER, LINE = 6.4, 13  # width and height of a name's letter
RADIUS, GAP = 5, 8  # of a point, and from its middle to its name
LONGEST = 26  # letters of a name in a chart
COLORS = 8  # that the page's style has


class Point(NamedTuple):
    """A network in a chart of quality over cost."""

    name: str
    cost: float
    quality: float


class Tick(NamedTuple):
    """A value on an axis: where it is, in pixels, and its text."""

    at: float
    text: str


class Place(NamedTuple):
    """Where a label begins or ends, which is its ``anchor``."""

    x: float
    y: float
    anchor: Literal["start", "end"]


class Mark(NamedTuple):
    """A point, its name, what is written of it and where, and its values in words."""

    at: tuple[float, float]
    name: str
    text: str
    label: Place
    values: str
    color: int


class Line(NamedTuple):
    """A polyline: the ``points`` attribute of SVG, its name in the legend, its color, and if it is a single point."""

    points: str
    name: str
    color: int
    is_dot: bool


@dataclass(frozen=True)
class Chart:
    """A chart to draw."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    frontier: str = ""  # the points of the Pareto line
    hidden: list[str] = field(default_factory=list)  # networks not drawn, which would squeeze the others together


class Axis:
    """A scale from values to pixels, logarithmic if ``log`` and values differ much; ``whole``: of integers."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        most: float = math.inf,
        whole: bool = False,
    ) -> None:
        low, high = min(values), max(values)
        self._least_step = 1.0 if whole else 0.0
        self.log = log and low > 0 and high / low >= LOG_FROM
        if self.log:
            low, high = low / 1.3, high * 1.3
        else:
            margin = 0.08 * (high - low) or self._least_step / 2 or abs(high) * 0.01 or 1.0
            low, high = low - margin, high + margin
        self._most = most
        self._start, self._length = start, end - start
        self._low, self._high = self._scaled(low), self._scaled(high)
        self._bounds = low, high

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._start + share * self._length, 1)

    def ticks(self) -> list[Tick]:
        """Return four to eight round values."""
        low, high = self._bounds
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if len(decades) < 4 else (1,)
            values = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = max(_round_step((high - low) / 5), self._least_step)
            values = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [Tick(self.at(value), f"{value:.6g}") for value in values if low <= value <= min(high, self._most)]

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def trade_off(title: str, points: Sequence[Point], labels: tuple[str, str], most: float = math.inf) -> Chart:
    """Draw quality over cost, with the Pareto line through the networks that no other one beats in both.

    Args:
        title: The chart's title.
        points: One for each network.
        labels: Of the horizontal axis, on which less is better, and of the vertical one, on which more is better.
        most: The largest quality there is.
    """
    cost, quality = labels
    x = Axis([point.cost for point in points], LEFT, RIGHT, log=True)
    y = Axis([point.quality for point in points], BOTTOM, TOP, most=most)
    places = [(x.at(point.cost), y.at(point.quality)) for point in points]
    names = [_shortened(point.name) for point in points]
    where = _labels(names, places)
    marks = [
        Mark(at, point.name, name, label, f"{cost}: {point.cost:.4g}; {quality}: {point.quality:.4g}", index % COLORS)
        for index, (point, name, at, label) in enumerate(zip(points, names, places, where, strict=True))
    ]
    best = [_svg_point(*places[index]) for index in frontier(points)]
    return Chart(title, cost, quality, x.ticks(), y.ticks(), marks, frontier=" ".join(best))


def frontier(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other one beats, the cheapest first."""
    best, found = -math.inf, []
    for index in sorted(range(len(points)), key=lambda each: (points[each].cost, -points[each].quality)):
        if points[index].quality > best:
            best = points[index].quality
            found.append(index)
    return found


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Chart:
    """Draw lines over whole numbers, such as a metric by epoch; ``series``: name -> points (x, y)."""
    every = [point for points in series.values() for point in points]
    x, y = Axis([each[0] for each in every], LEFT, RIGHT, whole=True), Axis([each[1] for each in every], BOTTOM, TOP)
    lines = [
        Line(
            " ".join(_svg_point(x.at(a), y.at(b)) for a, b in (*points, points[-1])),
            name,
            index % COLORS,
            len(points) == 1,
        )
        for index, (name, points) in enumerate(series.items())  # the last point twice: one alone would not be drawn
    ]
    return Chart(title, x_label, y_label, x.ticks(), y.ticks(), lines=lines)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"


def _svg_point(x: float, y: float) -> str:
    return f"{x:g},{y:g}"


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Place]:
    """Return where to write each name, so that it covers no point and no other name if there is room."""
    boxes = [(x - RADIUS, x + RADIUS, y) for x, y in places]  # left, right and middle of what is drawn
    found: dict[int, Place] = {}
    for index in sorted(range(len(names)), key=lambda each: places[each][1]):
        (x, middle), width = places[index], LETTER * len(names[index])
        at_end = x + GAP + width > RIGHT
        left = x - GAP - width if at_end else x + GAP
        near = [box for start, right, box in boxes if left < right and start < left + width]
        below, above = range(int(BOTTOM - LINE - middle)), range(-1, int(TOP + LINE - middle), -1)
        free = (middle + step for step in (*below, *above) if all(abs(middle + step - box) >= LINE for box in near))
        middle = next(free, middle)
        boxes.append((left, left + width, middle))
        found[index] = Place(x - GAP if at_end else x + GAP, middle + LINE / 3, "end" if at_end else "start")
    return [found[index] for index in range(len(names))]
