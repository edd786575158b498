"""Which channels to keep: one threshold over the whole network, then widths that kernels and groups can work with.

The lowest-scored ``floor(percent * total)`` channels go, whichever layers they are in, but none of the best ``unit``
channels of a layer, where unit is the multiple that its width must keep. The counts that remain are rounded to
multiples (ties up). Where an operation takes the channels in equal pieces, the best channels of each piece are kept.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from micronet.pruning.config import PruneConfig
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import STRIDE

Scores = Mapping[int, NDArray[np.float64]]
Signatures = dict[int, list[tuple[int, ...]]]


@dataclass(frozen=True)
class GroupPlan:
    """What happens to channels that are cut together.

    ``layers``: those that produce them. ``kept``: which channel becomes the new network's channel 0, 1, ...
    ``note``: what changed the width that the threshold alone would give, or why it stays; may be empty.
    """

    layers: list[str]
    before: int
    kept: list[int]
    note: str

    @property
    def after(self) -> int:
        """Return the new width."""
        return len(self.kept)


@dataclass(frozen=True)
class Plan:
    """Every group's fate. ``asked``, ``cut``, ``total``: channels, of those that may be cut at all."""

    groups: dict[int, GroupPlan]
    asked: int
    cut: int
    total: int


class Planner:
    """Decides on the widths and the channels of one network."""

    def __init__(self, flow: Flow, scores: Scores, config: PruneConfig, unjudged: str) -> None:
        self._flow = flow
        self._scores = scores
        self._config = config
        self._notes = {group: flow.pinned.get(group, unjudged) for group in flow.widths}
        self._units = {group: self._unit(group) for group in flow.widths}
        self._free = [group for group in flow.widths if group not in flow.pinned and group in scores]
        for group in list(self._free):
            self._notes[group] = ""
            if self._units[group] > flow.widths[group]:
                self._free.remove(group)
                self._notes[group] = f"{flow.widths[group]} channels cannot be a multiple of {self._units[group]}"
        self._old = _signatures(flow)

    def plan(self) -> Plan:
        """Choose widths, then channels."""
        total = sum(self._flow.widths[group] for group in self._free)
        asked = int(Fraction(str(self._config.percent)) * total)  # exact: 0.29 of 100 is 29, in floats 28
        widths = self._settle_pieces(self._round(self._threshold(asked)))
        new = _signatures(self._flow.with_widths(widths))
        groups = {
            group: GroupPlan(
                self._flow.names[group],
                self._flow.widths[group],
                self._choose(group, new.get(group, [()] * widths[group])),
                self._notes[group],
            )
            for group in self._flow.widths
        }
        cut = sum(groups[group].before - groups[group].after for group in self._free)
        return Plan(groups, asked, cut, total)

    def _threshold(self, asked: int) -> dict[int, int]:
        """Return how many channels of each free group are left when the ``asked`` lowest-scored are gone."""
        entries: list[tuple[float, int, int, bool]] = []
        for group in self._free:
            order = np.argsort(-self._scores[group], kind="stable")
            for rank, channel in enumerate(order.tolist()):
                score = float(self._scores[group][channel])
                entries.append((score, group, -rank, rank >= self._units[group]))
        entries.sort()
        unprotected = Counter(group for _, group, _, _ in entries[:asked])
        cut = Counter(group for _, group, _, loose in [entry for entry in entries if entry[3]][:asked])
        for group in self._free:
            if self._flow.widths[group] - unprotected[group] < self._units[group]:
                self._note(group, f"kept {self._units[group]}, the least it may have")
        return {group: self._flow.widths[group] - cut[group] for group in self._free}

    def _round(self, counts: dict[int, int]) -> dict[int, int]:
        """Round widths to the nearest multiple (ties up), at least one, at most what the group has."""
        widths = dict(self._flow.widths)
        for group, count in counts.items():
            unit, most = self._units[group], self._flow.widths[group]
            multiple = max(1, min(math.floor(count / unit + 0.5), most // unit)) * unit
            widths[group] = multiple
            if multiple != count:
                self._note(group, f"{count} made a multiple of {unit}")
        return widths

    def _settle_pieces(self, widths: dict[int, int]) -> dict[int, int]:
        """Lower widths until every channel can stay in the piece it is in; where none will do, keep the group whole."""
        while True:
            new = _signatures(self._flow.with_widths(widths))
            stuck = [group for group in new if not self._fits(group, widths[group], new[group])]
            if not stuck:
                return widths
            for group in stuck:
                if group in self._free and widths[group] < self._flow.widths[group]:
                    self._lower(group, widths)
                else:  # it cannot move, so those it shares pieces with must not
                    for other in self._neighbours(group):
                        widths[other] = self._flow.widths[other]

    def _lower(self, group: int, widths: dict[int, int]) -> None:
        smaller = widths[group] - self._units[group]
        widths[group] = smaller if smaller > 0 else self._flow.widths[group]
        if smaller > 0:
            self._note(group, f"{widths[group]} is what its groups of channels allow")
        else:
            self._note(group, "no smaller width keeps its channels in their groups")

    def _neighbours(self, group: int) -> set[int]:
        found: set[int] = set()
        for pieces in self._flow.pieces:
            members = set((pieces.ids // STRIDE).tolist())
            if group in members:
                found |= members
        return found

    def _fits(self, group: int, width: int, new: list[tuple[int, ...]]) -> bool:
        old = self._old[group]
        if width == len(old):
            return new == old
        have, need = Counter(old), Counter(new)
        return all(have[signature] >= count for signature, count in need.items())

    def _choose(self, group: int, new: list[tuple[int, ...]]) -> list[int]:
        """Return the best channels for the places of a group's new width, each from the piece its place is in."""
        width = self._flow.widths[group]
        if len(new) == width:
            return list(range(width))
        old = self._old.get(group, [()] * width)
        best = np.argsort(-self._scores[group], kind="stable").tolist()
        chosen: dict[tuple[int, ...], list[int]] = {}
        for signature, count in Counter(new).items():
            chosen[signature] = sorted([channel for channel in best if old[channel] == signature][:count])
        return [chosen[signature].pop(0) for signature in new]

    def _unit(self, group: int) -> int:
        """Return the number that a group's width must be a multiple of."""
        counts = [pieces.number for pieces in self._flow.pieces if (pieces.ids // STRIDE == group).any()]
        return math.lcm(self._config.regular, *counts)

    def _note(self, group: int, text: str) -> None:
        self._notes[group] = "; ".join(filter(None, [self._notes[group], text]))


def _signatures(flow: Flow) -> Signatures:
    """Return, for each channel of each group that is taken in pieces, the piece it is in for every operation."""
    found: dict[int, list[list[int]]] = {}
    for pieces in flow.pieces:
        if not pieces.fixed:
            continue
        size = len(pieces.ids) // pieces.number
        for position, number in enumerate(pieces.ids.tolist()):
            group, channel = divmod(number, STRIDE)
            if group not in found:
                found[group] = [[] for _ in range(flow.widths[group])]
            found[group][channel].append(position // size)
    return {group: [tuple(places) for places in channels] for group, channels in found.items()}
