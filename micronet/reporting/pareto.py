"""Quality over cost: the main metric of networks over their latency and over their bytes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from micronet.core.metrics import EQUAL_DB, metric_label
from micronet.evaluation import plot
from micronet.evaluation.report import Row
from micronet.reporting import charts
from micronet.reporting.charts import Chart, Point
from micronet.tasks.task import Task

SQNR = "sqnr_db"
FAR = 0.2  # drop of accuracy from which a network is not drawn beside others: these would be on one line


class TradeOff(NamedTuple):
    """Networks by their cost, of which less is better, and their quality, of which more is."""

    title: str
    points: list[Point]
    labels: tuple[str, str]  # of the cost and of the quality
    most: float  # the largest quality there is
    hidden: list[str]  # networks that are not drawn, because they lose too much

    def chart(self) -> Chart:
        """Return the chart for a page."""
        return replace(charts.trade_off(*self[:-1]), hidden=self.hidden)


def trade_offs(rows: Sequence[Row], task: Task) -> list[TradeOff]:
    """Return the main metric over latency and over bytes, for the networks of which both are known.

    Networks that lose far more accuracy than the others are hidden if at least two remain.
    """
    shown = SQNR if all(SQNR in row.metrics for row in rows) else task.main  # decibels say more than an error near 0
    better = 1 if shown == SQNR or task.higher_is_better else -1
    percent = task.main == "accuracy"
    quality = [better * row.metrics[shown] * (100 if percent else 1) for row in rows]
    quality = [math.nan if shown == SQNR and value >= EQUAL_DB else value for value in quality]
    label = f"{'-' if better < 0 else ''}{metric_label(shown)}{', %' if percent else ', dB' if shown == SQNR else ''}"
    found = []
    for cost, title, values in (
        ("ms for one sample", f"{label} over latency", [row.latency_ms for row in rows]),
        ("KB of the file", f"{label} over size", [row.size_bytes / 1000 for row in rows]),
    ):
        known = [
            (Point(row.name, value, each), percent and row.drop > FAR)
            for row, value, each in zip(rows, values, quality, strict=True)
            if value and math.isfinite(each)
        ]
        near, far = ([point for point, is_far in known if is_far == side] for side in (False, True))
        if len(near) < 2:
            near, far = [point for point, _ in known], []
        if len(near) > 1:
            hidden = [point.name for point in far]
            found.append(TradeOff(title, near, (cost, label), 100.0 if percent else math.inf, hidden))
    return found


def draw(found: Sequence[TradeOff], path: Path) -> None:
    """Draw trade-offs beside each other, as the page does, into a .png, .svg or .pdf file."""

    def fill(axes: Any) -> None:
        for axis, each in zip(axes[0], found, strict=True):
            _fill(axis, each.chart())

    plot.draw(path, (6.0 * len(found), 4.2), fill, (1, len(found)))


def _fill(axis: Any, chart: Chart) -> None:
    """Draw a chart on an axis of its pixels."""
    axis.set(xlim=(charts.LEFT, charts.RIGHT), ylim=(charts.BOTTOM, charts.TOP))
    axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axis.set_xticks(*zip(*chart.x_ticks, strict=True))
    axis.set_yticks(*zip(*chart.y_ticks, strict=True))
    axis.grid(alpha=0.4)
    best = [tuple(map(float, point.split(","))) for point in chart.frontier.split()]
    axis.plot(*zip(*best, strict=True), "--", color="gray")
    for mark in chart.marks:
        axis.plot(*mark.at, "o", color=f"C{mark.color}")
        side = {"start": "left", "end": "right"}[mark.label.anchor]
        place = mark.label.x, mark.label.y - charts.LINE / 3
        axis.text(*place, plot.plain(mark.text), ha=side, va="center", fontsize=8)
