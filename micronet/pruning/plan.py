"""Which channels to keep: one threshold for the whole network, then widths that kernels and grouped layers allow.

The ``floor(percent * total)`` channels with the lowest scores go, in whichever layers they are, but never the best
``multiple`` channels of a group. The remaining width is rounded to a multiple (ties up). If a layer takes its channels
in equal parts, the best channels of each part are kept.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from micronet.core.config import matching
from micronet.errors import MicronetError, count
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.choice import Signature, choose, fits, signatures
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import Scores
from micronet.pruning.ids import groups_of

_OTHER_FIXED = "forward() uses its number of channels where another number is fixed"
_NO_WIDTH = "stays whole: no smaller width suits the parts it is taken in"


@dataclass(frozen=True)
class GroupPlan:
    """What happens to one group of channels.

    ``layers`` produce the channels, ``before`` is their number, ``keep`` is the old channel of each new one, ``note``
    says why the width is not what the threshold alone would give, or why the group stays ("" if there is no reason).
    """

    layers: list[str]
    before: int
    keep: list[int]
    note: str

    @property
    def after(self) -> int:
        """The width after pruning."""
        return len(self.keep)


@dataclass(frozen=True)
class PrunePlan:
    """What happens to a network; ``channels``: those of the pruned network.

    Of ``total`` channels that may be cut, the config asks for ``requested`` and ``cut`` are cut.
    """

    groups: dict[int, GroupPlan]
    channels: ChannelMap
    requested: int
    cut: int
    total: int

    @property
    def keep(self) -> dict[int, list[int]]:
        """Group -> the old channel of each new one."""
        return {number: group.keep for number, group in self.groups.items()}


def excluded_groups(channels: ChannelMap, config: PruneConfig) -> set[int]:
    """Return the groups with layers that ``exclude`` names. Raises MicronetError if it names no layer."""
    group_of = {name: number for number, group in channels.groups.items() for name in group.layers}
    return {group_of[name] for name in matching(config, "exclude", group_of)}


class Planner:
    """Chooses the widths and the channels of one network.

    Attributes:
        free: The groups that may be cut.
    """

    def __init__(self, channels: ChannelMap, scores: Scores, config: PruneConfig, why_unscored: str) -> None:
        self._channels = channels
        self._groups = channels.groups
        self._scores = scores
        self._config = config
        self._widths = {number: group.width for number, group in self._groups.items()}
        self._multiple = {n: math.lcm(config.regular, group.multiple) for n, group in self._groups.items()}
        self._minimum = {n: math.ceil(config.min_channels / m) * m for n, m in self._multiple.items()}
        excluded = excluded_groups(channels, config)
        self._why = {number: self._why_whole(number, excluded, why_unscored) for number in self._groups}
        self._notes: dict[int, list[str]] = {}
        self.free = [number for number, why in self._why.items() if not why]
        self._signatures = signatures(channels)

    def plan(self, percent: float) -> PrunePlan:
        """Plan to cut a share of the channels: choose widths, then channels."""
        self._reset_notes()
        total = sum(self._widths[group] for group in self.free)
        share = Fraction(str(percent))  # exact: 0.29 of 100 is 29; in floats it is 28
        if self._config.scope == "global":
            widths = self._threshold(int(share * total))
        else:
            after = {group: self._widths[group] - int(share * self._widths[group]) for group in self.free}
            widths = {group: max(self._minimum[group], width) for group, width in after.items()}
        return self._finish(self._round(widths), int(share * total))

    def plan_widths(self, requested: Mapping[int, int]) -> PrunePlan:
        """Plan to cut some groups to given widths. Raise MicronetError if a group cannot have its width."""
        self._reset_notes()
        for group, width in requested.items():
            multiple, widest = self._multiple[group], self._widths[group]
            if not 1 <= width <= widest or (width % multiple and width != widest):
                rule = f", a multiple of {multiple}{self._grouped_readers(group)}" if multiple > 1 else ""
                raise MicronetError(
                    f"{self._named({group})} cannot have {width} channels; allowed: 1 to {widest}{rule}"
                )
        plan = self._finish({**self._widths, **requested}, 0)
        for group, width in requested.items():
            if plan.groups[group].after != width:
                raise MicronetError(
                    f"{self._named({group})} cannot have {width} channels: a grouped layer combines them with the "
                    f"channels of {self._named(self._neighbors(group) - {group})}, and these widths do not match; "
                    "change one of them"
                )
        return plan

    def plan_some(self, plan: PrunePlan, groups: Sequence[int]) -> PrunePlan:
        """Plan to cut some groups as a plan does, and no others."""
        self._reset_notes()
        return self._finish({**self._widths, **{group: plan.groups[group].after for group in groups}}, 0)

    def keep_whole(self, group: int, why: str) -> None:
        """Cut no channels of a free group in later plans."""
        self._why[group] = why
        self.free.remove(group)

    def rounded(self, group: int, share: float) -> int:
        """Return the width of a free group after cutting a share of its channels."""
        return self._round({group: round((1 - share) * self._widths[group])})[group]

    def _why_whole(self, group: int, excluded: set[int], why_unscored: str) -> str:
        """Return why a group must stay whole, or ""."""
        width, multiple, minimum = self._widths[group], self._multiple[group], self._minimum[group]
        if self._groups[group].pinned:
            return self._groups[group].pinned
        if group not in self._scores:
            return why_unscored
        if minimum <= width:
            return "excluded" if group in excluded else ""
        if minimum > multiple:
            return f"{count(width, 'channel')}, fewer than the minimum of {minimum}"
        return f"{count(width, 'channel')}, too few for a multiple of {multiple}"

    def _reset_notes(self) -> None:
        self._notes = {number: [why] if why else [] for number, why in self._why.items()}

    def _finish(self, widths: dict[int, int], requested: int) -> PrunePlan:
        channels, new = self._settle_parts(widths)
        groups = {}
        for number, group in self._groups.items():
            notes = self._notes[number]
            keep = choose(group, self._scores.get(number), self._signatures[number], new[number])
            if widths[number] < len(keep) == group.width:  # what brought it to that width no longer counts
                notes = [_OTHER_FIXED if _OTHER_FIXED in notes else _NO_WIDTH]
            note = "; ".join(dict.fromkeys(notes))
            groups[number] = GroupPlan(group.layers, group.width, keep, note)
        cut = sum(groups[number].before - groups[number].after for number in self.free)
        return PrunePlan(groups, channels, requested, cut, sum(self._widths[number] for number in self.free))

    def _grouped_readers(self, group: int) -> str:
        """Return which layers take a group's channels in equal parts, in words; may be ""."""
        layers = self._channels.layers.items()
        names = [name for name, layer in layers if layer.parts > 1 and group in groups_of(np.concatenate(layer.ends))]
        return f" for the groups of {', '.join(names)}" if names else ""

    def _named(self, groups: set[int]) -> str:
        return ", ".join(name for group in sorted(groups) for name in self._groups[group].layers) or "itself"

    def _threshold(self, removed: int) -> dict[int, int]:
        """Return the width of each free group without the ``removed`` channels of the lowest scores."""
        entries: list[tuple[float, float, int, bool]] = []
        for group in self.free:
            order = np.argsort(-self._scores[group], kind="stable")
            for rank, channel in enumerate(order.tolist()):
                score = float(self._scores[group][channel])
                # of equal scores, as in an untrained network, every group loses the same share
                entries.append((score, -rank / len(order), group, rank >= self._minimum[group]))
        entries.sort()
        unprotected = Counter(group for _, _, group, _ in entries[:removed])
        cut = Counter([group for _, _, group, loose in entries if loose][:removed])
        for group in self.free:
            if self._widths[group] - unprotected[group] < self._minimum[group]:
                limit = f"limited by the minimum of {count(self._minimum[group], 'channel')}"
                in_one_part = self._groups[group].multiple >= self._widths[group] > 1
                self._notes[group].append(_NO_WIDTH if in_one_part else limit)
        return {group: self._widths[group] - cut[group] for group in self.free}

    def _round(self, counts: dict[int, int]) -> dict[int, int]:
        """Round widths to the nearest multiple (ties up), within the minimum and the present width."""
        widths = dict(self._widths)
        for group, target in counts.items():
            multiple, widest = self._multiple[group], self._widths[group]
            nearest = min(math.floor(target / multiple + 0.5), widest // multiple) * multiple
            widths[group] = max(self._minimum[group], nearest)
            if widths[group] != target:
                self._notes[group].append(f"{target} rounded to a multiple of {multiple}")
        return widths

    def _settle_parts(self, first: dict[int, int]) -> tuple[ChannelMap, dict[int, list[Signature]]]:
        """Change widths until every channel can stay in its part. A group that finds no such width stays whole.

        Returns the map of the pruned network, and its channels' signatures.
        """
        widths = dict(first)
        while widths != self._widths:  # this ends: a group goes down, then up to its present width, and stays there
            channels, new, stuck = self._try(widths)
            if not stuck:
                return channels, new
            before = dict(widths)
            for group in stuck:
                if group in self.free and widths[group] < self._widths[group]:
                    widths[group] = self._next(group, widths[group], first[group])
                else:  # it cannot change, so the groups that share its parts must not change either
                    widths |= {other: self._widths[other] for other in self._neighbors(group)}
            if widths == before:
                culprit = self._culprit(widths)
                self._notes[culprit].append(_OTHER_FIXED)
                widths[culprit] = self._widths[culprit]
        return self._channels, self._signatures

    def _try(self, widths: dict[int, int]) -> tuple[ChannelMap, dict[int, list[Signature]], list[int]]:
        """Return the map of the network with other widths, its signatures, and the groups that these do not suit."""
        channels, table = self._channels.with_widths(widths), self._channels.table
        new = signatures(channels)
        merged = self._widths.keys() - new.keys()  # at width 1, with one that is broadcast along its channels
        stuck = [
            group
            for group in self._widths
            if group in merged or not fits(self._groups[group], self._signatures[group], new[group])
        ]
        stuck += {channels.table.root(group) for group in merged}
        pinned = {table.root(group) for group in channels.pinned if group in table.widths}
        stuck += pinned - self._channels.pinned.keys()
        return channels, new, list(dict.fromkeys(stuck))  # once each: a group would skip the next width

    def _culprit(self, widths: dict[int, int]) -> int:
        """Return a group whose width suits no other group: the network is fine with those of the groups before it."""
        cut = [group for group in self.free if widths[group] < self._widths[group]]
        fine, wrong = 0, len(cut)  # how many of them may be cut, and how many may not
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            some = {**self._widths, **{group: widths[group] for group in cut[:middle]}}
            fine, wrong = (fine, middle) if self._try(some)[2] else (middle, wrong)
        return cut[fine]

    def _next(self, group: int, width: int, first: int) -> int:
        """Return the width to try after one that does not fit: first smaller ones, then larger ones."""
        multiple, whole = self._multiple[group], self._widths[group]
        following = width - multiple if width <= first else width + multiple
        if following < max(self._minimum[group], multiple):
            following = first + multiple
        self._notes[group].append("adjusted to a width that suits the parts it is taken in")
        return min(following, whole)

    def _neighbors(self, group: int) -> set[int]:
        """Return the groups whose channels an operation takes in parts together with those of a group."""
        together = [set(groups_of(reshape.ids)) for reshape in self._channels.reshapes.values()]
        return set().union(*(members for members in together if group in members))
