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
FAR = 0.2  # drop of accuracy from which a network is not drawn: the others would be on one line


class TradeOff(NamedTuple):
    """Networks by their cost, of which less is better, and their quality, of which more is."""

    title: str
    points: list[Point]
    labels: tuple[str, str]  # of the cost and of the quality
    most: float  # the largest quality there is
    hidden: list[str]  # networks that are not drawn

    def chart(self) -> Chart:
        """Return the chart for a page."""
        return replace(charts.trade_off(*self[:-1]), hidden=self.hidden)


def trade_offs(rows: Sequence[Row], task: Task) -> list[TradeOff]:
    """Return the main metric over latency and over bytes, for the networks of which both are known."""
    shown = SQNR if all(SQNR in row.metrics for row in rows) else task.main  # decibels say more than an error near 0
    better = 1 if shown == SQNR or task.higher_is_better else -1
    percent = task.main == "accuracy"
    quality = [better * row.metrics[shown] * (100 if percent else 1) for row in rows]
    quality = [math.nan if shown == SQNR and value >= EQUAL_DB else value for value in quality]
    hidden = [row.name for row in rows if percent and row.drop > FAR]
    label = f"{'-' if better < 0 else ''}{metric_label(shown)}{', %' if percent else ', dB' if shown == SQNR else ''}"
    found = []
    for cost, title, values in (
        ("ms for one sample", f"{label} over latency", [row.latency_ms for row in rows]),
        ("KB of the file", f"{label} over size", [row.size_bytes / 1000 for row in rows]),
    ):
        points = [
            Point(row.name, value, each)
            for row, value, each in zip(rows, values, quality, strict=True)
            if value and math.isfinite(each) and not (percent and row.drop > FAR)
        ]
        if len(points) > 1:
            found.append(TradeOff(title, points, (cost, label), 100.0 if percent else math.inf, hidden))
    return found


def draw(found: Sequence[TradeOff], path: Path) -> None:
    """Draw trade-offs beside each other, with the line of the networks that no other one beats in both."""

    def fill(axes: Any) -> None:
        for axis, each in zip(axes[0], found, strict=True):
            best = [each.points[index] for index in charts.frontier(each.points)]
            axis.plot([point.cost for point in best], [point.quality for point in best], "--", color="gray", zorder=0)
            for point in each.points:
                axis.plot(point.cost, point.quality, "o")
                axis.annotate(plot.plain(point.name), point[1:], fontsize=7, xytext=(5, 3), textcoords="offset points")
            costs = [point.cost for point in each.points]
            if max(costs) >= charts.LOG_FROM * min(costs):
                axis.set_xscale("log")
            axis.set(title=each.title, xlabel=each.labels[0], ylabel=each.labels[1])

    plot.draw(path, (6.0 * len(found), 4.2), fill, (1, len(found)))
