"""Groups of channels: every layer starts one; groups merge when their channels must be cut together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    def spread(self, places: Ids, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of values (n,) of channels (n,) by channel of the group, (width,).

        The values of only some parts' channels are those of the same channels in every part.
        """
        size = self.width // self.parts
        if self.parts > 1 and len(np.unique(places)) < self.width:
            places = places % size + size * np.arange(self.parts, dtype=np.int64)[:, None]
        # np.add.at would read beyond values that are broadcast (NumPy 2.4.6).
        weights = np.broadcast_to(values, places.shape)
        summed: NDArray[np.float64] = np.bincount(places.ravel(), weights.ravel(), self.width).astype(np.float64)
        return summed


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
        self._own: dict[int, int] = {}  # the layers' own widths
        self._parent: dict[int, int] = {}
        self._shares: dict[int, tuple[int, int, int]] = {}  # a group's equal parts, its heads and how many share each
        self._blocks: list[tuple[int, int, int]] = []

    def is_narrowed(self, ids: Ids) -> bool:
        """Return True if there are fewer of these channels than in the network itself."""
        return any(self.widths[group] < self._own[group] for group in groups_of(ids))

    def assign(self, name: str, width: int) -> Ids:
        """Return ids for a layer's outputs. A layer gets the same ids every time."""
        group = self._numbers[name]
        self.widths[group], self._own[group] = self._chosen.get(group, width), width
        return group * STRIDE + np.arange(self.widths[group], dtype=np.int64)

    def merge(self, left: Ids, right: Ids, *, why: str = "") -> None:
        """Make channels equal, pair by pair. Pin groups that do not match each other completely and in order.

        A group may match equal parts of a wider one, as queries match a third of the layer that makes keys and values
        too. All parts of the wider group are then cut alike. ``why``: the reason for pinning, if it is another one than
        that tensors are combined.
        """
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
                self.pin(of_pair.ravel(), why or "it is combined with a tensor that cannot be pruned")
            elif not (self._tie(first, of_pair) if first == second else self._join(first, second, of_pair % STRIDE)):
                self.pin(of_pair.ravel(), why or "it is combined with a tensor whose channels are in a different order")

    def merge_heads(self, many: Ids, few: Ids) -> bool:
        """Make each of a few heads (heads, d) equal to as many of many heads as share it; False if they do not match.

        The many must be all channels of their group, and the few those of an equal part of theirs.
        """
        times, size = len(many) // len(few), few.shape[1]
        many, few = self.canonical(many), self.canonical(few)
        if (many[::times] == few).all():
            return True
        group, other = int(many[0, 0]) // STRIDE, int(few[0, 0]) // STRIDE
        places = few.ravel() % STRIDE
        whole = (
            (many.ravel() == group * STRIDE + np.arange(self.widths[group])).all()
            if many.size == self.widths[group]
            else False
        )
        if group == other or not whole or places[0] % few.size or (np.diff(places) != 1).any():
            return False
        self._parent[other] = group
        self._shares[other] = few.size, size, times
        self._blocks.append((group, size * times, 1))
        return True

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

    def scaled(self, widths: Mapping[int, int]) -> dict[int, int]:
        """Return the width of every group for other widths of the merged ones."""
        roots = {group: self.root(group) for group in self.widths}
        return {group: widths[root] * self.widths[group] // self.widths[root] for group, root in roots.items()}

    def canonical(self, ids: Ids) -> Ids:
        """Replace every id's group by its root. A group that matches parts of its root gets those of the first."""
        found: Ids = ids.copy()
        for group in groups_of(ids):
            mine = ids // STRIDE == group
            places = ids[mine] % STRIDE
            while group in self._parent:
                if group in self._shares:
                    part, size, times = self._shares[group]
                    places = places % part // size * (size * times) + places % size
                group = self._parent[group]
            found[mine] = group * STRIDE + places
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
            size, parts = self._in_root(group, size, parts)
            blocks[root] = _combined((size, parts), blocks.get(root, (1, 1)), self.widths[root])
        pinned = {self.root(group): why for group, why in reversed(self.pinned.items())}
        return {
            root: ChannelGroup(
                names, self.widths[root], _said_of(names, pinned.get(root, "")), blocks.get(root, (None, 1))[0],
                parts=blocks.get(root, (None, 1))[1],
            )
            for root, names in layers.items()
        }  # fmt: skip

    def _in_root(self, group: int, size: int, parts: int) -> tuple[int, int]:
        """Return what a block and its parts are in the group that represents theirs."""
        while group in self._parent:
            parent = self._parent[group]
            if group in self._shares:
                _, head, times = self._shares[group]
                size, parts = math.lcm(size, head) * times, 1
            else:
                parts *= self.widths[parent] // self.widths[group]
            group = parent
        return size, parts

    def _tie(self, group: int, pairs: Ids) -> bool:
        """Keep or cut channels of one group alike: all of a block, or those whose places differ by a multiple.

        Return False if pairs of channels (2, n) are neither.
        """
        width, (left, right) = self.widths[group], pairs % STRIDE
        apart = math.gcd(*np.abs(left - right).tolist(), width)
        sizes = [size for size in range(int(np.abs(left - right).max()) + 1, width // 2 + 1) if width % size == 0]
        if block := next((size for size in sizes if (left // size == right // size).all()), 0):
            self._blocks.append((group, block, 1))
        elif apart == 1 and self.is_narrowed(pairs):
            self._blocks.append((group, width, 1))  # only one block is left
        elif apart == 1:
            return False
        else:
            self._blocks.append((group, 1, self.widths[group] // apart))
        return True

    def _join(self, first: int, second: int, pairs: Ids) -> bool:
        """Merge two groups; False if pairs of channels (2, n) do not show a counterpart of every channel, in order."""
        if (self.widths[first], -first) > (self.widths[second], -second):
            first, second, pairs = second, first, pairs[::-1]
        width, parts = self.widths[first], self.widths[second] // self.widths[first]
        complete = len(np.unique(pairs[0])) == width and self.widths[second] == parts * width
        if not complete or (pairs[1] % width != pairs[0]).any():
            return False
        self._parent[first] = second
        if parts > 1:
            self._blocks.append((second, 1, parts))
        return True


def _said_of(layers: list[str], why: str) -> str:
    """Return a reason without its subject if that is the only layer, which whoever prints the reason names."""
    return why.removeprefix(f"{layers[0]} ") if len(layers) == 1 else why


def _combined(one: tuple[int, int], other: tuple[int, int], width: int) -> tuple[int, int]:
    """Return (block, parts) that keep together what either of two such pairs keeps together."""
    part = math.gcd(width // one[1], width // other[1])
    block = math.lcm(one[0], other[0])
    return (block if part % block == 0 else part), width // part
