"""What is asked for, and the choice among candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

from micronet.compression.point import Point, Quantity, spell_drop, spell_enough
from micronet.core.config import flag
from micronet.core.timing import NOISE

SAME_SIZE = 1.02  # sizes this close are alike: a file records how often its network was trained, for instance
UNITS = {"latency": "latency", "size": "size", "macs": "multiply-accumulates"}
BEST = {
    "latency": "the fastest candidate",
    "size": "the smallest candidate",
    "macs": "the candidate with the fewest multiply-accumulates",
}


@dataclass(frozen=True)
class Choice:
    """The candidate that is chosen, and what is missing to the goal in words; empty if it is met."""

    point: Point
    miss: str = ""


@dataclass(frozen=True)
class Goal:
    """The least, or a fraction of the original's, of a quantity, within a drop of the metric.

    Attributes:
        quantity: The quantity.
        max_drop: The largest drop, 0..1.
        target: The fraction of the original's quantity that may be left; None: as little as possible.
    """

    quantity: Quantity
    max_drop: float
    target: float | None = None

    def is_met_by(self, share: float) -> bool:
        """Whether a fraction of the original's quantity is small enough; never without a target."""
        return self.target is not None and share <= self.target

    def choose(self, points: Sequence[Point]) -> Choice:
        """Return the best candidate; the first is the original.

        With a target, it is the one with the least drop that meets it. Otherwise, or if none within the drop meets it,
        it is the one with the least of the quantity within the drop; of those that are as fast within the noise of
        timing, or nearly as small, the one with the least drop, and then the smallest. Within the drop means that the
        drop and its standard error are: the best of many candidates on few samples is one that was lucky on them.
        """
        made = [point for point in points if not point.failed]
        whole = self.value(made[0])
        within = [point for point in made if point.surely_keeps(self.max_drop)]
        meeting = [point for point in within if self.is_met_by(self.value(point) / whole)]
        if meeting:
            return Choice(min(meeting, key=lambda point: (point.drop, self.value(point))))
        limit = min(map(self.value, within)) * {"latency": NOISE, "size": SAME_SIZE}.get(self.quantity, 1.0)
        alike = [point for point in within if self.value(point) <= limit]
        least = min(alike, key=lambda point: (point.drop, point.size_bytes))
        if self.target is None:
            return Choice(least)
        return Choice(least, self._miss(made, whole, min(within, key=self.value)))

    def value(self, point: Point) -> float:
        """Return the quantity of a candidate; infinity if it is not known."""
        return point.value(self.quantity)

    def _miss(self, made: Sequence[Point], whole: float, least: Point) -> str:
        """Say that the target is not met, and what would have to give."""
        best, name = BEST[self.quantity], flag(f"target_{self.quantity}")
        said = (
            f"{name} {self.target:g} is not met: {best} within --max-drop {100 * self.max_drop:g} is {least.name}, "
            f"with {self.value(least) / whole:.3g} of the original's {UNITS[self.quantity]}"
        )
        small = [point for point in made if self.is_met_by(self.value(point) / whole)]
        if small:
            least_drop = min(small, key=lambda point: point.worst_drop)
            drop, enough = spell_drop(least_drop), spell_enough(least_drop)
            return f"{said}; {least_drop.name} meets it with a drop of {drop}: raise --max-drop to {enough}"
        other = min(made, key=self.value)
        if not other.surely_keeps(self.max_drop):
            drop = spell_drop(other)
            said += f"; {best} of all is {other.name}, with {self.value(other) / whole:.3g} and a drop of {drop}"
        return f"{said}; raise {name}, or --max-drop and --budget"
