"""Groups of channels: every layer starts one; groups merge when their channels must be cut together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from micronet.pruning.ids import FIXED, STRIDE, Ids, groups_of


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be cut together, in all layers that read them and in ``layers``, which produce them.

    Attributes:
        pinned: Why they are never cut, or "".
        block: How many neighboring channels are kept or cut as one, such as an attention head's; None: each alone.
        parts: In how many equal parts of the group, as in a gated linear unit's two, blocks at the same place are one.
        multiple: What the width must be a multiple of.
    """

    layers: list[str]
    width: int
    pinned: str = ""
    block: int | None = None
    multiple: int = 1
    parts: int = 1


class GroupTable:
    """Assigns channel ids, merges groups and records which groups are pinned, that is never cut.

    Attributes:
        widths: Group -> number of channels.
        pinned: Group -> why it is never cut.
    """

    def __init__(self, numbers: Mapping[str, int], chosen: Mapping[int, int], pinned: Mapping[int, str]) -> None:
        """Start empty. ``numbers``: layer -> its group; ``chosen``: widths of groups that replace the layers' own."""
        self.widths: dict[int, int] = {}
        self.pinned: dict[int, str] = dict(pinned)
        self._numbers = numbers
        self._chosen = chosen
        self._parent: dict[int, int] = {}
        self._blocks: list[tuple[int, int, int]] = []

    def assign(self, name: str, width: int) -> Ids:
        """Return ids for a layer's outputs. A layer gets the same ids every time."""
        group = self._numbers[name]
        self.widths[group] = self._chosen.get(group, width)
        return group * STRIDE + np.arange(self.widths[group], dtype=np.int64)

    def merge(self, left: Ids, right: Ids) -> None:
        """Make channels equal, pair by pair. Pin groups that do not match each other completely and in order."""
        if left.shape != right.shape:
            for ids in (left, right):
                self.pin(ids, "it is combined with a tensor that has a different number of channels")
            return
        left, right = self.canonical(left), self.canonical(right)
        differ = left != right
        pairs = np.unique(np.stack([left[differ], right[differ]]), axis=1)
        pair_groups = pairs // STRIDE
        for first, second in np.unique(pair_groups, axis=1).T.tolist():
            of_pair = pairs[:, (pair_groups[0] == first) & (pair_groups[1] == second)]
            if FIXED in (first, second):
                self.pin(of_pair.ravel(), "it is combined with a tensor that cannot be pruned")
            elif first == second:
                self._tie(first, of_pair)
            elif not self._match(first, second, of_pair % STRIDE):
                self.pin(of_pair.ravel(), "it is combined with a tensor whose channels are in a different order")
            else:
                roots = self.root(first), self.root(second)
                self._parent[max(roots)] = min(roots)

    def pin(self, ids: Ids, why: str) -> None:
        """Never cut these channels. The first reason is kept."""
        for group in groups_of(ids):
            self.pinned.setdefault(group, why)

    def add_block(self, ids: Ids, size: int) -> None:
        """Keep or cut every ``size`` neighboring channels of the group of these channels as one."""
        self._blocks.append((int(ids.flat[0]) // STRIDE, size, 1))

    def root(self, group: int) -> int:
        """Return the group that represents a group and all groups merged with it."""
        while (parent := self._parent.get(group, group)) != group:
            group = parent
        return group

    def canonical(self, ids: Ids) -> Ids:
        """Replace every id's group by its root."""
        groups, places = np.unique(ids // STRIDE, return_inverse=True)
        roots = np.array([g if g == FIXED else self.root(g) for g in groups.tolist()], dtype=np.int64)
        found: Ids = np.where(ids == FIXED, FIXED, roots[places.reshape(ids.shape)] * STRIDE + ids % STRIDE)
        return found

    def groups(self) -> dict[int, ChannelGroup]:
        """Return the merged groups by root."""
        layers: dict[int, list[str]] = {}
        for name, group in self._numbers.items():
            if group in self.widths:
                layers.setdefault(self.root(group), []).append(name)
        blocks: dict[int, tuple[int, int]] = {}
        for group, size, parts in self._blocks:
            root = self.root(group)
            blocks[root] = _combined((size, parts), blocks.get(root, (1, 1)), self.widths[root])
        pinned = {self.root(group): why for group, why in reversed(self.pinned.items())}
        return {
            root: ChannelGroup(
                names, self.widths[root], pinned.get(root, ""), blocks.get(root, (None, 1))[0],
                parts=blocks.get(root, (None, 1))[1],
            )
            for root, names in layers.items()
        }  # fmt: skip

    def _tie(self, group: int, pairs: Ids) -> None:
        """Keep or cut channels of one group alike: all whose places differ by a multiple of what these differ by."""
        apart = math.gcd(*np.abs(pairs[0] - pairs[1]).tolist())
        if self.widths[group] % apart:
            self.pin(pairs.ravel(), "it is combined with a tensor whose channels are in a different order")
        else:
            self._blocks.append((group, 1, self.widths[group] // apart))

    def _match(self, first: int, second: int, pairs: Ids) -> bool:
        """Return True if pairs of channels (2, n) are all channels of two groups, each with its counterpart."""
        width = self.widths[first]
        complete = width == self.widths[second] == pairs.shape[1] and first != second
        return bool(complete and (pairs == np.arange(width)).all())


def _combined(one: tuple[int, int], other: tuple[int, int], width: int) -> tuple[int, int]:
    """Return (block, parts) that keep together what either of two such pairs keeps together."""
    part = math.gcd(width // one[1], width // other[1])
    block = math.lcm(one[0], other[0])
    return (block if part % block == 0 else part), width // part
