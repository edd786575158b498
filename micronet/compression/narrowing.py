"""The candidates with fewer channels: plans of a walk at several costs, and those that cut every group alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from micronet.compression.goal import Goal
from micronet.compression.groups import Groups
from micronet.compression.plan import Plan
from micronet.compression.prediction import Prediction
from micronet.compression.search import Walk, narrower, spread
from micronet.compression.workshop import Workshop
from micronet.errors import count

UNIFORM = (0.25, 0.5)  # shares of all groups that are cut
POINTS = (0.65, 0.5, 0.8, 0.38, 0.28)  # of the base's cost: candidates of the walk, extremes last
FIRST = 2  # candidates of the walk before uniform ones, for budgets that are too short for all
REHEARSED = 3  # plans of the walk that are made without training first
BETWEEN, NEAR = 4, 0.95  # plans to try between others, at most, unless these cost nearly the same
MARGIN = 0.97  # of a target: what a candidate that is to meet it may be predicted to cost
Named = tuple[str, Plan]
Cuts = dict[str, list[list[float]]]  # the noise of cutting shares of each group alone; see ``cut_noise``


@dataclass
class Narrowing:
    """Finds plans with fewer channels.

    Attributes:
        workshop: Where candidates are made.
        prediction: What plans cost.
        groups: The groups of channels.
        goal: What is asked for.
        names: Names of plans, by their widths.
        path: The plans of the walk, once it is done.
        left: How many more ``between`` returns.
    """

    workshop: Workshop
    prediction: Prediction
    groups: Groups
    goal: Goal
    names: dict[tuple[int, ...], str] = field(default_factory=dict)
    path: list[Plan] = field(default_factory=list)
    left: int = BETWEEN

    def plans(self, base: Plan, cuts: Cuts) -> list[Named]:
        """Return narrower plans than ``base``, those to try first in the front: of the walk, and uniform ones.

        Some of the walk are made before, without training; see ``_rehearse``.
        """
        self.path = path = self._path(base, cuts)
        if self.goal.quantity == "latency":
            self._rehearse()
        self.workshop.prediction = self.prediction
        wanted = [] if self.goal.target is None else [self._target / self.prediction(base)]
        plans = self._chosen(path, [*wanted, *POINTS])
        named = [(self._name(plan), plan) for plan in plans]
        uniform = [(uniform_name(share), replace(base, widths=self.groups.uniform(share))) for share in UNIFORM]
        others = [each for each in uniform if each[1] not in plans]
        timed = (plan for _, plan in others)
        self.workshop.notes.decide("layers of uniform plans", lambda: self.prediction.prepare(timed))
        return [*named[:FIRST], *others, *named[FIRST:]]

    def between(self) -> Named | None:
        """Return the plan between the narrowest that keeps the drop and the next that does not; None if none is left.

        Plans that were not tried lie between them on the walk: bisection, since the drop grows along it, noise aside.
        """
        tried = self._tried()
        keeping = [index for index, keeps in tried.items() if keeps]
        low = max(keeping, default=0)
        high = min((index for index, keeps in tried.items() if not keeps and index > low), default=None)
        if high is None or self.left == 0:
            return None
        if (middle := self._middle(low, high)) is None:
            return None
        self.left -= 1
        return self._name(self.path[middle]), self.path[middle]

    def _rehearse(self) -> None:
        """Make plans of the walk without training, which shows their latency: others are predicted between them.

        First is the last one, then the one in the middle between it and the first, then the one between these two:
        where the first steps leave widths that a runtime is slow at, the layers' own latencies say little.
        """
        place: int | None = len(self.path) - 1
        for _ in range(REHEARSED):
            if not place or not self.workshop.attempt(self._name(self.path[place]), self.path[place]):
                return
            self.prediction.compare(self.path[place], self.goal.value(self.workshop.points[-1]))
            place = self._middle(0, place)

    def _middle(self, low: int, high: int) -> int | None:
        """Return the place on the walk whose cost is halfway between those of two others; None if they are too close.

        ``low``, ``high``: Places on the walk.
        """
        costs = {index: self.prediction(self.path[index]) for index in range(low, high + 1)}
        mean = (costs[low] + costs[high]) / 2
        middle = min(costs, key=lambda index: abs(costs[index] - mean))
        return None if middle in (low, high) or costs[high] > NEAR * costs[low] else middle

    def _tried(self) -> dict[int, bool]:
        """Return which plans of the walk were made, by their place, and whether one kept the drop, trained or not."""
        trains = any(point.plan.epochs for point in self.workshop.points)
        places = {plan.widths: index for index, plan in enumerate(self.path)}
        found = {0: True}
        for point in self.workshop.points:
            place = places.get(point.plan.widths)
            if place and (point.plan.epochs or not trains):  # a rehearsal says nothing of what training gives
                found[place] = found.get(place, False) or point.surely_keeps(self.goal.max_drop)
        return found

    def _path(self, base: Plan, cuts: Cuts) -> list[Plan]:
        """Walk from a plan to cheaper ones; return all of them."""
        groups, notes = self.groups, self.workshop.notes
        multiples = {group: groups.multiples[group] for group in groups.widths if str(group) in cuts}
        walk: Walk[Plan] = Walk(
            narrower(groups.widths, multiples), self.prediction, lambda plan: groups.plan_noise(plan, cuts),
            self.prediction.prepare, groups.allows, narrower(groups.widths, multiples, far=True),
        )  # fmt: skip
        found = notes.decide("walk", lambda: [each.widths for each in walk.path(base)])
        path = [replace(base, widths=tuple(widths)) for widths in found]
        least = self.prediction(path[-1]) / self.goal.value(self.workshop.points[0])
        steps = count(len(path) - 1, "step")
        self.workshop.progress.line(f"walked {steps}, down to {least:.2f} of the original")
        return path

    def _chosen(self, path: Sequence[Plan], shares: Sequence[float]) -> list[Plan]:
        """Return plans of the walk at predicted costs that are shares of the first one's."""
        cost: Callable[[Plan], float] = self.prediction
        return spread(path, cost, [share * cost(path[0]) for share in shares])

    @property
    def _target(self) -> float:
        """What a plan may be predicted to cost if it is to meet the target."""
        return MARGIN * (self.goal.target or 0.0) * self.goal.value(self.workshop.points[0])

    def _name(self, plan: Plan) -> str:
        """Return the name of a plan of the walk."""
        if plan.widths not in self.names:
            name = f"{sum(plan.widths) / sum(self.groups.widths.values()):.1%} of channels"
            alike = sum(other.startswith(name) for other in self.names.values())
            self.names[plan.widths] = f"{name}, {alike + 1}" if alike else name
        return self.names[plan.widths]


def uniform_name(share: float) -> str:
    """Return the name of the candidate that cuts the same share of every group."""
    return f"{1 - share:.0%} of every layer"
