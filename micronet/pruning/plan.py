"""Which channels to keep: one threshold for the whole network, then widths that kernels and grouped layers allow.

The ``floor(percent * total)`` channels with the lowest scores go, in whichever layers they are, but never the best
``multiple`` channels of a group. The remaining width is rounded to a multiple (ties up). If a layer takes its channels
in equal parts, the best channels of each part are kept.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from micronet.core.config import matching
from micronet.errors import MicronetError
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import Scores
from micronet.pruning.ids import groups_of
from micronet.pruning.signatures import Signature, signatures


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


class Planner:
    """Chooses the widths and the channels of one network."""

    def __init__(self, channels: ChannelMap, scores: Scores, config: PruneConfig, why_unscored: str) -> None:
        self._channels = channels
        self._groups = channels.groups
        self._scores = scores
        self._config = config
        self._widths = {number: group.width for number, group in self._groups.items()}
        self._multiple = {n: math.lcm(config.regular, group.multiple) for n, group in self._groups.items()}
        self._minimum = {n: math.ceil(config.min_channels / m) * m for n, m in self._multiple.items()}
        excluded = self._excluded()
        self._why = {
            number: group.pinned or ("" if number in scores else why_unscored) or self._why_whole(number, excluded)
            for number, group in self._groups.items()
        }
        self._notes = dict(self._why)
        self._free = [number for number, why in self._why.items() if not why]
        self._old = signatures(channels)

    @property
    def free(self) -> list[int]:
        """The groups that may be cut."""
        return list(self._free)

    def plan(self, percent: float) -> PrunePlan:
        """Plan to cut a share of the channels: choose widths, then channels."""
        self._notes = dict(self._why)
        total = sum(self._widths[group] for group in self._free)
        requested = int(Fraction(str(percent)) * total)  # exact: 0.29 of 100 is 29; in floats it is 28
        widths = self._threshold(requested) if self._config.scope == "global" else self._shares(percent)
        return self._finish(self._round(widths), requested)

    def plan_widths(self, requested: Mapping[int, int]) -> PrunePlan:
        """Plan to cut some groups to given widths. Raise MicronetError if a group cannot have its width."""
        self._notes = dict(self._why)
        for group, width in requested.items():
            multiple, widest = self._multiple[group], self._widths[group]
            if not 1 <= width <= widest or (width % multiple and width != widest):
                rule = f", a multiple of {multiple}{self._grouped_readers(group)}" if multiple > 1 else ""
                raise MicronetError(
                    f"{self._named([group])} cannot have {width} channels; allowed: 1 to {widest}{rule}"
                )
        plan = self._finish({**self._widths, **requested}, 0)
        for group, width in requested.items():
            if plan.groups[group].after != width:
                raise MicronetError(
                    f"{self._named([group])} cannot have {width} channels together with the other widths: a grouped "
                    f"layer reads its channels with those of {self._named(self._neighbors(group) - {group})}; "
                    "change one of these widths"
                )
        return plan

    def rounded(self, group: int, share: float) -> int:
        """Return the width of a free group after cutting a share of its channels."""
        return self._round({group: round((1 - share) * self._widths[group])})[group]

    def _why_whole(self, group: int, excluded: set[int]) -> str:
        """Return why a group with scores stays whole in spite of them, or ""."""
        width, multiple, minimum = self._widths[group], self._multiple[group], self._minimum[group]
        if minimum <= width:
            return "excluded" if group in excluded else ""
        if minimum > multiple:
            return f"{width} channels are fewer than the minimum of {minimum}"
        return f"{width} channels are too few for a multiple of {multiple}"

    def _finish(self, widths: dict[int, int], requested: int) -> PrunePlan:
        widths, channels = self._settle_parts(widths)
        new = signatures(channels)
        groups: dict[int, GroupPlan] = {}
        for number, group in self._groups.items():
            keep = self._choose(number, new.get(number, [()] * widths[number]))
            groups[number] = GroupPlan(group.layers, group.width, keep, self._notes[number])
        cut = sum(groups[number].before - groups[number].after for number in self._free)
        total = sum(self._widths[number] for number in self._free)
        return PrunePlan(groups, channels, requested, cut, total)

    def _excluded(self) -> set[int]:
        group_of = {name: number for number, group in self._groups.items() for name in group.layers}
        return {group_of[name] for name in matching(self._config, "exclude", group_of)}

    def _grouped_readers(self, group: int) -> str:
        """Return which layers take a group's channels in equal parts, in words; may be ""."""
        layers = self._channels.layers.items()
        ends = {name: [ids for ids in (layer.inputs, layer.outputs) if ids is not None] for name, layer in layers}
        names = [n for n in ends if self._channels.parts(n) > 1 and any(group in groups_of(ids) for ids in ends[n])]
        return f" for the groups of {', '.join(names)}" if names else ""

    def _named(self, groups: Iterable[int]) -> str:
        return ", ".join(name for group in sorted(groups) for name in self._groups[group].layers) or "itself"

    def _shares(self, percent: float) -> dict[int, int]:
        """Return the width of each free group if each loses the same share."""
        widths = self._widths
        return {
            group: max(self._minimum[group], widths[group] - int(Fraction(str(percent)) * widths[group]))
            for group in self._free
        }

    def _threshold(self, count: int) -> dict[int, int]:
        """Return the width of each free group without the ``count`` channels of the lowest scores."""
        entries: list[tuple[float, float, int, bool]] = []
        for group in self._free:
            order = np.argsort(-self._scores[group], kind="stable")
            for rank, channel in enumerate(order.tolist()):
                score = float(self._scores[group][channel])
                # of equal scores, as in an untrained network, every group loses the same share
                entries.append((score, -rank / len(order), group, rank >= self._minimum[group]))
        entries.sort()
        unprotected = Counter(group for _, _, group, _ in entries[:count])
        cut = Counter(group for _, _, group, loose in [entry for entry in entries if entry[3]][:count])
        for group in self._free:
            if self._widths[group] - unprotected[group] < self._minimum[group]:
                self._note(group, f"{self._minimum[group]} channels is the minimum")
        return {group: self._widths[group] - cut[group] for group in self._free}

    def _round(self, counts: dict[int, int]) -> dict[int, int]:
        """Round widths to the nearest multiple (ties up), within the minimum and the present width."""
        widths = dict(self._widths)
        for group, count in counts.items():
            multiple, widest = self._multiple[group], self._widths[group]
            nearest = min(math.floor(count / multiple + 0.5), widest // multiple) * multiple
            widths[group] = max(self._minimum[group], nearest)
            if widths[group] != count:
                self._note(group, f"{count} rounded to a multiple of {multiple}")
        return widths

    def _settle_parts(self, widths: dict[int, int]) -> tuple[dict[int, int], ChannelMap]:
        """Change widths until every channel can stay in its part. A group that finds no such width stays whole."""
        first, whole = dict(widths), dict(self._widths)
        while True:  # this ends: a group goes down, then up to its present width, and stays there
            channels = self._channels.with_widths(widths)
            new = signatures(channels)
            merged = self._widths.keys() - new.keys()  # at width 1, with one that is broadcast along its channels
            stuck = [g for g in self._widths if g in merged or not self._fits(g, widths[g], new[g])]
            stuck += {channels.table.root(group) for group in merged}
            pinned = {
                self._channels.table.root(group) for group in channels.pinned if group in self._channels.table.widths
            }
            stuck += pinned - self._channels.pinned.keys()
            if not stuck:
                return widths, channels
            before = dict(widths)
            for group in stuck:
                if group in self._free and widths[group] < whole[group]:
                    widths[group] = self._next(group, widths[group], first[group])
                else:  # it cannot change, so the groups that share its parts must not change either
                    widths |= {other: whole[other] for other in self._neighbors(group)}
            if widths == before:
                widths = dict(whole)

    def _next(self, group: int, width: int, first: int) -> int:
        """Return the width to try after one that does not fit: first smaller ones, then larger ones."""
        multiple, whole = self._multiple[group], self._widths[group]
        following = width - multiple if width <= first else width + multiple
        if following < max(self._minimum[group], multiple):
            following = first + multiple
        self._note(group, "limited to a width that the grouped layers allow")
        return min(following, whole)

    def _neighbors(self, group: int) -> set[int]:
        found: set[int] = set()
        operations = [ids for ids, _ in self._channels.grouped]
        operations += [reshape.ids for reshape in self._channels.reshapes.values()]
        for members in map(set, map(groups_of, operations)):
            if group in members:
                found |= members
        return found

    def _fits(self, group: int, width: int, new: list[Signature]) -> bool:
        old = self._old[group]
        if width == len(old):
            return new == old
        if self._groups[group].block:
            return len({*old, *new}) == 1
        have, need = Counter(old), Counter(new)
        return all(have[signature] >= count for signature, count in need.items())

    def _choose(self, group: int, new: list[Signature]) -> list[int]:
        """Return the best old channel for each position of a group's new width, from the part that it lies in."""
        width = self._widths[group]
        if len(new) == width:
            return list(range(width))
        if (size := self._groups[group].block) is not None:
            return self._choose_blocks(group, len(new), size)
        old = self._old.get(group, [()] * width)
        best = np.argsort(-self._scores[group], kind="stable").tolist()
        chosen: dict[Signature, list[int]] = {}
        for signature, count in Counter(new).items():
            chosen[signature] = sorted([channel for channel in best if old[channel] == signature][:count])
        return [chosen[signature].pop(0) for signature in new]

    def _choose_blocks(self, group: int, width: int, size: int) -> list[int]:
        """Return the channels of the blocks with the best mean scores."""
        means = self._scores[group].reshape(-1, size).mean(1)
        blocks = np.sort(np.argsort(-means, kind="stable")[: width // size])
        chosen: list[int] = (blocks[:, None] * size + np.arange(size)).ravel().tolist()
        return chosen

    def _note(self, group: int, text: str) -> None:
        known = filter(None, self._notes[group].split("; "))
        self._notes[group] = "; ".join(dict.fromkeys([*known, text]))
