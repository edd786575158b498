"""A candidate's figures: a point of the front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from micronet.compression.plan import Plan

TOLERANCE = 1e-9  # of a drop
Quantity = Literal["latency", "size", "macs"]


@dataclass(frozen=True)
class Point:
    """What a plan gave.

    Attributes:
        name: What people call it.
        plan: The plan.
        drop: Of the metric on the validation data, 0..1 of it, relative to the original.
        drop_error: The standard error of the drop, if it is known.
        resolution: The drop that one sample makes, if the metric is a share of samples: no smaller error is shown.
        quality: The metric itself, negated if less is better.
        latency_ms: Measured in the runtime; None if nothing is timed.
        predicted_ms: Predicted before it was measured.
        size_bytes: Of the deployed file or folder.
        macs: Multiply-accumulates for one sample, if they can be counted.
        minutes: That it took to make and measure.
        failed: Why it could not be made, or "".
    """

    name: str
    plan: Plan
    drop: float = 0.0
    drop_error: float | None = None
    resolution: float = 0.0
    quality: float = 0.0
    latency_ms: float | None = None
    predicted_ms: float | None = None
    size_bytes: int = 0
    macs: int | None = None
    minutes: float = 0.0
    failed: str = ""

    def value(self, quantity: Quantity) -> float:
        """Return one of the figures that are to be small; infinity if it is not known."""
        found = {"latency": self.latency_ms, "size": self.size_bytes, "macs": self.macs}[quantity]
        return math.inf if found is None else float(found)

    def keeps(self, max_drop: float) -> bool:
        """Whether it was made and loses at most this much; metrics are sums of floats, so nearly equal is equal."""
        return not self.failed and self.drop <= max_drop + TOLERANCE

    @property
    def worst_drop(self) -> float:
        """The drop and one standard error."""
        return self.drop + (self.drop_error or 0.0)

    def surely_keeps(self, max_drop: float) -> bool:
        """Whether it was made and loses at most this much, even if the drop is one standard error larger."""
        return not self.failed and self.worst_drop <= max_drop + TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return {**vars(self), "plan": self.plan.to_json()}


def spell_drop(point: Point) -> str:
    """Return a drop in words, with its standard error if it is known."""
    return f"{100 * point.drop:.2f}{spell_error(point.drop_error, point.resolution)} points"


def spell_error(error: float | None, resolution: float) -> str:
    """Return the standard error of a drop in words, at least that of one sample that differs; "" if it is not known."""
    return "" if error is None else f" ± {100 * max(error, resolution):.2f}"


def spell_enough(point: Point) -> str:
    """Return the least ``--max-drop`` that a candidate surely keeps, in points."""
    return f"{math.ceil(1e4 * point.worst_drop - 1e-6) / 100:g}"


def front(points: Sequence[Point], quantity: Quantity) -> list[Point]:
    """Return the candidates that no other beats in both the drop and a quantity, the largest first."""
    made = [point for point in points if not point.failed]

    def beats(other: Point, point: Point) -> bool:
        ours, theirs = (other.value(quantity), other.drop), (point.value(quantity), point.drop)
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    found = [point for point in made if not any(beats(other, point) for other in made)]
    return sorted(found, key=lambda point: -point.value(quantity))
