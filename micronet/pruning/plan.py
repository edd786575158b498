"""Which channels to keep: one threshold over the whole network, then widths that kernels and groups can work with.

The lowest-scored ``floor(percent * total)`` channels go, whichever layers they are in, but none of the best ``unit``
channels of a layer, where unit is the multiple that its width must keep. The counts that remain are rounded to
multiples (ties up). Where an operation takes the channels in equal pieces, the best channels of each piece are kept.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from micronet.core.config import matching
from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import FIXED, STRIDE, Ids, groups_of

Scores = Mapping[int, NDArray[np.float64]]
Signature = tuple[tuple[str, int], ...]
Signatures = dict[int, list[Signature]]


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
    """Every group's fate. ``asked``, ``cut``, ``total``: channels, of those that may be cut. ``flow``: with them."""

    groups: dict[int, GroupPlan]
    flow: Flow
    asked: int
    cut: int
    total: int


class Planner:
    """Decides on the widths and the channels of one network."""

    def __init__(self, flow: Flow, scores: Scores, config: PruneConfig, unjudged: str) -> None:
        self._flow = flow
        self._scores = scores
        self._config = config
        self._why = {group: flow.pinned.get(group, unjudged) for group in flow.widths}
        self._notes = dict(self._why)
        self._units = {group: math.lcm(config.regular, flow.units.get(group, 1)) for group in flow.widths}
        self._least = {group: math.ceil(config.min_channels / unit) * unit for group, unit in self._units.items()}
        chosen_out = self._excluded()
        self._free = [group for group in flow.widths if group not in flow.pinned and group in scores]
        for group in list(self._free):
            self._why[group] = "by choice" if group in chosen_out else ""
            if self._least[group] > flow.widths[group]:
                self._why[group] = f"{flow.widths[group]} channels cannot be a multiple of {self._units[group]}"
                if self._least[group] > self._units[group]:
                    self._why[group] = f"{flow.widths[group]} channels are fewer than {self._least[group]}"
            if self._why[group]:
                self._free.remove(group)
        self._old = _signatures(flow)

    @property
    def free(self) -> list[int]:
        """Return the groups that may be cut."""
        return list(self._free)

    def plan(self, percent: float) -> Plan:
        """Cut a share of the channels: choose widths, then channels."""
        self._notes = dict(self._why)
        total = sum(self._flow.widths[group] for group in self._free)
        asked = int(Fraction(str(percent)) * total)  # exact: 0.29 of 100 is 29, in floats 28
        counts = self._threshold(asked) if self._config.scope == "global" else self._shares(percent)
        return self._carry_out(self._round(counts), asked)

    def plan_widths(self, wanted: Mapping[int, int]) -> Plan:
        """Cut some groups to given widths. Raises MicronetError where a group cannot have its width."""
        self._notes = dict(self._why)
        for group, width in wanted.items():
            unit, most = self._units[group], self._flow.widths[group]
            if not 1 <= width <= most or (width % unit and width != most):
                multiple = f", a multiple of {unit}{self._asking(group)}" if unit > 1 else ""
                raise MicronetError(
                    f"{', '.join(self._flow.names[group])} cannot have {width} channels; allowed: 1 to {most}{multiple}"
                )
        plan = self._carry_out({**self._flow.widths, **wanted}, 0)
        for group, width in wanted.items():
            if plan.groups[group].after != width:
                raise MicronetError(
                    f"{', '.join(self._flow.names[group])} cannot have {width} channels beside the other widths, its "
                    f"channels are read in groups with those of {self._named(self._neighbours(group) - {group})}"
                )
        return plan

    def rounded(self, group: int, share: float) -> int:
        """Return the width that a free group has without a share of its channels."""
        return self._round({group: round((1 - share) * self._flow.widths[group])})[group]

    def _carry_out(self, widths: dict[int, int], asked: int) -> Plan:
        widths, flow = self._settle_pieces(widths)
        new = _signatures(flow)
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
        total = sum(self._flow.widths[group] for group in self._free)
        return Plan(groups, flow, asked, cut, total)

    def _excluded(self) -> set[int]:
        groups = {name: group for group, layers in self._flow.names.items() for name in layers}
        return {groups[name] for name in matching(self._config, "exclude", groups)}

    def _asking(self, group: int) -> str:
        """Return which layers take a group's channels in equal pieces, in words; may be empty."""
        flow = self._flow
        ends = {
            name: [ids for ids in (layer.inputs, layer.outputs) if ids is not None]
            for name, layer in flow.layers.items()
        }
        asking = [name for name in ends if flow.pieces(name) > 1 and any(group in groups_of(ids) for ids in ends[name])]
        return f" for the groups of {', '.join(asking)}" if asking else ""

    def _named(self, groups: Iterable[int]) -> str:
        return ", ".join(name for group in sorted(groups) for name in self._flow.names[group]) or "themselves"

    def _shares(self, percent: float) -> dict[int, int]:
        """Return how many channels of each free group are left when each loses the same share."""
        widths = self._flow.widths
        return {
            group: max(self._least[group], widths[group] - int(Fraction(str(percent)) * widths[group]))
            for group in self._free
        }

    def _threshold(self, asked: int) -> dict[int, int]:
        """Return how many channels of each free group are left when the ``asked`` lowest-scored are gone."""
        entries: list[tuple[float, float, int, bool]] = []
        for group in self._free:
            order = np.argsort(-self._scores[group], kind="stable")
            for rank, channel in enumerate(order.tolist()):
                score = float(self._scores[group][channel])
                # of equals, as untrained scales are, every group loses the same share
                entries.append((score, -rank / len(order), group, rank >= self._least[group]))
        entries.sort()
        unprotected = Counter(group for _, _, group, _ in entries[:asked])
        cut = Counter(group for _, _, group, loose in [entry for entry in entries if entry[3]][:asked])
        for group in self._free:
            if self._flow.widths[group] - unprotected[group] < self._least[group]:
                self._note(group, f"kept {self._least[group]}, the least it may have")
        return {group: self._flow.widths[group] - cut[group] for group in self._free}

    def _round(self, counts: dict[int, int]) -> dict[int, int]:
        """Round widths to the nearest multiple (ties up), at least the least, at most what the group has."""
        widths = dict(self._flow.widths)
        for group, count in counts.items():
            unit, most = self._units[group], self._flow.widths[group]
            multiple = min(math.floor(count / unit + 0.5), most // unit) * unit
            widths[group] = max(self._least[group], multiple)
            if widths[group] != count:
                self._note(group, f"{count} made a multiple of {unit}")
        return widths

    def _settle_pieces(self, widths: dict[int, int]) -> tuple[dict[int, int], Flow]:
        """Lower widths until every channel can stay in the piece it is in; where none will do, keep the group whole."""
        asked, whole = dict(widths), dict(self._flow.widths)
        while True:  # ends: a group goes down, then up, to whole, and stays there
            flow = self._flow.with_widths(widths)
            new = _signatures(flow)
            joined = self._flow.widths.keys() - new.keys()  # at width 1, with one that is broadcast along its channels
            stuck = [g for g in self._flow.widths if g in joined or not self._fits(g, widths[g], new[g])]
            stuck += {flow.root(group) for group in joined}
            now = {self._flow.root(group) for group in flow.pinned if group in self._flow.known}
            stuck += now - self._flow.pinned.keys()
            if not stuck:
                return widths, flow
            before = dict(widths)
            for group in stuck:
                if group in self._free and widths[group] < whole[group]:
                    widths[group] = self._next(group, widths[group], asked[group])
                else:  # it cannot move, so those it shares pieces with must not
                    widths |= {other: whole[other] for other in self._neighbours(group)}
            if widths == before:
                widths = dict(whole)

    def _next(self, group: int, width: int, asked: int) -> int:
        """Return the width to try after one that does not fit: ever smaller ones, then ever larger ones."""
        unit, whole = self._units[group], self._flow.widths[group]
        following = width - unit if width <= asked else width + unit
        if following < max(self._least[group], unit):
            following = asked + unit
        self._note(group, "the width is what its groups of channels allow")
        return min(following, whole)

    def _neighbours(self, group: int) -> set[int]:
        found: set[int] = set()
        operations = [ids for ids, _ in self._flow.grouped] + [move.ids for move in self._flow.reshaped.values()]
        for members in map(set, map(groups_of, operations)):
            if group in members:
                found |= members
        return found

    def _fits(self, group: int, width: int, new: list[Signature]) -> bool:
        old = self._old[group]
        if width == len(old):
            return new == old
        if group in self._flow.blocks:
            return len({*old, *new}) == 1
        have, need = Counter(old), Counter(new)
        return all(have[signature] >= count for signature, count in need.items())

    def _choose(self, group: int, new: list[Signature]) -> list[int]:
        """Return the best channels for the places of a group's new width, each from the piece its place is in."""
        width = self._flow.widths[group]
        if len(new) == width:
            return list(range(width))
        if group in self._flow.blocks:
            return self._choose_blocks(group, len(new))
        old = self._old.get(group, [()] * width)
        best = np.argsort(-self._scores[group], kind="stable").tolist()
        chosen: dict[Signature, list[int]] = {}
        for signature, count in Counter(new).items():
            chosen[signature] = sorted([channel for channel in best if old[channel] == signature][:count])
        return [chosen[signature].pop(0) for signature in new]

    def _choose_blocks(self, group: int, width: int) -> list[int]:
        """Return the channels of the blocks that are best on average."""
        size = self._flow.blocks[group]
        worth = self._scores[group].reshape(-1, size).mean(1)
        blocks = np.sort(np.argsort(-worth, kind="stable")[: width // size])
        chosen: list[int] = (blocks[:, None] * size + np.arange(size)).ravel().tolist()
        return chosen

    def _note(self, group: int, text: str) -> None:
        known = filter(None, self._notes[group].split("; "))
        self._notes[group] = "; ".join(dict.fromkeys([*known, text]))


def _signatures(flow: Flow) -> Signatures:
    """Return, for each channel of each group, where it is read: the layers, and the piece of those with groups.

    A channel may take the place of another only where both are read alike.
    """
    found: dict[int, list[list[tuple[str, int]]]] = {
        group: [[] for _ in range(width)] for group, width in flow.widths.items()
    }

    def note(reader: str, ids: Ids, pieces: int) -> None:
        size = len(ids) // pieces
        for position, number in enumerate(ids.tolist()):
            if number != FIXED:
                group, channel = divmod(number, STRIDE)
                found[group][channel].append((reader, position // size))

    for name, layer in flow.layers.items():
        pieces = flow.pieces(name)
        if layer.inputs is not None:
            note(f"{name} reads", layer.inputs, pieces)
        if pieces > 1:
            note(f"{name} writes", layer.outputs, pieces)
    for name, ids in flow.norms.items():
        note(name, ids, 1)
    return {group: [tuple(sorted(places)) for places in channels] for group, channels in found.items()}
