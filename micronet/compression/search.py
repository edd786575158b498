"""The search: a greedy walk from one plan to cheaper ones, always the best saving for the noise it adds.

As in NetAdapt (Yang et al. 2018, arXiv:1804.03230), each step tries every move and takes one, here the one with the
largest saving per added noise. A mixed-integer linear program, which would choose all widths at once, does not fit: the
cost of a layer is a product of the widths of two groups, and a runtime's latency is not even linear in one of them. A
step of the walk evaluates every move exactly. The walk visits plans of every cost on its way, which the confirmation
needs anyway: where accuracy really falls, only trained candidates show.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from micronet.compression.plan import Plan

LEVELS = 8  # the widths that a group may have
SMALLEST_SHARE = 0.25  # of a group's channels that is left
P = TypeVar("P")


@dataclass(frozen=True)
class Walk(Generic[P]):
    """How to walk.

    Attributes:
        moves: The plans that are one step away.
        cost: What a plan costs.
        noise: What a plan loses, in a unit that adds up.
        prepare: Measures what the costs of plans need.
        allowed: Whether a plan can be carried out; it is asked only for the plan that is chosen.
        jumps: More plans, farther away, for where no move saves anything.
    """

    moves: Callable[[P], Iterable[P]]
    cost: Callable[[P], float]
    noise: Callable[[P], float]
    prepare: Callable[[Sequence[P]], None] = lambda _: None
    allowed: Callable[[P], bool] = lambda _: True
    jumps: Callable[[P], Iterable[P]] = lambda _: ()

    def path(self, start: P) -> list[P]:
        """Return the plans from ``start`` on, each one move after the other and cheaper."""
        path, banned = [start], list[P]()
        while True:
            chosen = self._best(path[-1], self.moves, banned) or self._best(path[-1], self.jumps, banned)
            if chosen is None:
                return path
            if self.allowed(chosen):
                path.append(chosen)
            else:
                banned.append(chosen)

    def _best(self, here: P, moves: Callable[[P], Iterable[P]], banned: Sequence[P]) -> P | None:
        """Return the plan that saves most for the noise that it adds; None if none saves anything."""
        following = [plan for plan in moves(here) if plan not in banned]
        self.prepare(following)
        cost, noise = self.cost(here), self.noise(here)
        ranked = []
        for number, plan in enumerate(following):
            saved, added = cost - self.cost(plan), self.noise(plan) - noise
            if saved > 0:
                rate = saved / added if added > 0 else float("inf")
                ranked.append((-rate, -saved, number))
        return following[min(ranked)[2]] if ranked else None


def ladder(width: int, multiple: int) -> list[int]:
    """Return the widths that a group of some width may have, all multiples, from the widest to the narrowest."""
    step = multiple * max(1, round(width / (LEVELS * multiple)))
    least = max(multiple, -(-round(SMALLEST_SHARE * width) // multiple) * multiple)
    return [width, *range((width - 1) // step * step, least - 1, -step)]


def narrower(
    groups: Mapping[int, int], multiples: Mapping[int, int], *, far: bool = False
) -> Callable[[Plan], Iterable[Plan]]:
    """Return a function from a plan to those with one group narrowed to its next width.

    Args:
        groups: Group -> width of the original, in the order of a plan's widths.
        multiples: Group -> what its widths are multiples of; groups that are missing stay as they are.
        far: Whether a group may go to any of the widths after its next one instead.
    """
    ladders = [ladder(width, multiples[group]) if group in multiples else [width] for group, width in groups.items()]

    def moves(plan: Plan) -> Iterable[Plan]:
        now = plan.widths or tuple(groups.values())
        for index, widths in enumerate(ladders):
            left = [width for width in widths if width < now[index]]
            for width in left[1:] if far else left[:1]:
                yield replace(plan, widths=(*now[:index], width, *now[index + 1 :]))

    return moves


def spread(path: Sequence[P], cost: Callable[[P], float], wanted: Sequence[float]) -> list[P]:
    """Return the plans of a path whose costs come closest to those wanted, each once."""
    found: list[P] = []
    for value in wanted:
        nearest = min(path[1:], key=lambda plan: abs(cost(plan) - value), default=None)
        if nearest is not None and nearest not in found:
            found.append(nearest)
    return found
