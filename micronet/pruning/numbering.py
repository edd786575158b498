"""Numbers for channels: one group a layer, groups joined where their channels are added to one another."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
STRIDE = 1 << 32  # a number is group * STRIDE + channel


class Numbering:
    """Gives out numbers, joins groups that must be cut alike, and remembers which must not be cut at all.

    ``widths``: channels of each group. ``pinned``: group -> why it is never cut.
    """

    def __init__(self, chosen: Mapping[int, int] | None = None, like: "Numbering | None" = None) -> None:
        """Begin; to number the same network with ``chosen`` widths, name the numbering it is ``like``."""
        self.widths: dict[int, int] = {}
        self.pinned: dict[int, str] = {}
        self._chosen = chosen
        self._like = like
        self._number: dict[str, int] = {}
        self._parent: dict[int, int] = {}

    def new(self, name: str, width: int) -> Ids:
        """Number the outputs of a layer; of one seen before, with the numbers it has."""
        group = self._number.setdefault(name, len(self._number))
        self._parent.setdefault(group, group)
        if self._chosen is not None and self._like is not None:
            width = self._chosen[self._like.root(group)]
        self.widths[group] = width
        return group * STRIDE + np.arange(width, dtype=np.int64)

    def unify(self, left: Ids | None, right: Ids | None) -> None:
        """Let channels be one another's equals, position by position; pin both where that is not simply so."""
        if left is None or right is None:
            self.pin(left, "it is added to channels that cannot be cut")
            self.pin(right, "it is added to channels that cannot be cut")
            return
        left, right = self.canonical(left), self.canonical(right)
        if np.array_equal(left, right):
            return
        groups = [self._whole_group(ids) for ids in (left, right)]
        if groups[0] is None or groups[1] is None or len(left) != len(right):
            self.pin(left, "it is added to channels in another order")
            self.pin(right, "it is added to channels in another order")
            return
        self._parent[max(groups[0], groups[1])] = min(groups[0], groups[1])

    def pin(self, ids: Ids | None, why: str) -> None:
        """Never cut these channels."""
        if ids is not None:
            for group in np.unique(ids // STRIDE).tolist():
                self.pinned.setdefault(group, why)

    def root(self, group: int) -> int:
        """Return the group that stands for all those a group's channels are added to."""
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def canonical(self, ids: Ids) -> Ids:
        """Name every channel by its group's root."""
        groups, places = np.unique(ids // STRIDE, return_inverse=True)
        roots = np.array([self.root(group) for group in groups.tolist()], dtype=np.int64)
        numbers: Ids = roots[places] * STRIDE + ids % STRIDE
        return numbers

    def names(self) -> dict[int, list[str]]:
        """Return the layers of every group, under the group's root."""
        found: dict[int, list[str]] = {}
        for name, group in self._number.items():
            found.setdefault(self.root(group), []).append(name)
        return found

    def _whole_group(self, ids: Ids) -> int | None:
        """Return the group that ids are, all of it and in order; None where they are not."""
        group = int(ids[0]) // STRIDE
        whole = group * STRIDE + np.arange(self.widths[group], dtype=np.int64)
        return group if np.array_equal(ids, whole) else None
