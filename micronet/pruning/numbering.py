"""Numbers for channels: one group a layer, groups joined where their channels are added to one another."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
STRIDE = 1 << 32  # a number is group * STRIDE + channel
FIXED = -1  # the number of whatever is not a channel of ours


class Numbering:
    """Gives out numbers, joins groups that must be cut alike, and remembers which must not be cut at all.

    ``widths``: channels of each group. ``pinned``: group -> why it is never cut.
    """

    def __init__(
        self,
        chosen: Mapping[int, int] | None = None,
        like: "Numbering | None" = None,
        pinned: Mapping[int, str] | None = None,
    ) -> None:
        """Begin; to number the same network with ``chosen`` widths, name the numbering it is ``like``."""
        self.widths: dict[int, int] = {}
        self.pinned: dict[int, str] = dict(pinned or {})
        self._chosen = chosen
        self._like = like
        self._number: dict[str, int] = {}
        self._parent: dict[int, int] = {}

    def new(self, name: str, width: int) -> Ids:
        """Number the outputs of a layer; of one seen before, with the numbers it has."""
        known = {} if self._like is None else self._like._number
        if name not in self._number:
            unknown = sum(other not in known for other in self._number)
            self._number[name] = known.get(name, len(known) + unknown)
        group = self._number[name]
        self._parent.setdefault(group, group)
        if name in known and self._chosen is not None and self._like is not None:
            width = self._chosen[self._like.root(group)]
        self.widths[group] = width
        return group * STRIDE + np.arange(width, dtype=np.int64)

    def unify(self, left: Ids, right: Ids) -> None:
        """Let channels be one another's equals, pair by pair; pin those of groups that are not wholly so, in order."""
        if left.shape != right.shape:
            self.pin(left, "it is combined with another number of channels")
            self.pin(right, "it is combined with another number of channels")
            return
        left, right = self.canonical(left), self.canonical(right)
        differ = left != right
        pairs = np.unique(np.stack([left[differ], right[differ]]), axis=1)
        pair_groups = pairs // STRIDE
        for ours, theirs in np.unique(pair_groups, axis=1).T.tolist():
            of_pair = pairs[:, (pair_groups[0] == ours) & (pair_groups[1] == theirs)]
            if FIXED in (ours, theirs):
                self.pin(of_pair.ravel(), "it is combined with what cannot be cut")
            elif not self._whole(ours, theirs, of_pair % STRIDE):
                self.pin(of_pair.ravel(), "it is combined with channels in another order")
            else:
                roots = self.root(ours), self.root(theirs)
                self._parent[max(roots)] = min(roots)

    def pin(self, ids: Ids | None, why: str) -> None:
        """Never cut these channels."""
        if ids is not None:
            for group in np.unique(ids // STRIDE).tolist():
                if group != FIXED:
                    self.pinned.setdefault(group, why)

    def root(self, group: int) -> int:
        """Return the group that stands for all those a group's channels are added to."""
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def canonical(self, ids: Ids) -> Ids:
        """Name every channel by its group's root."""
        groups, places = np.unique(ids // STRIDE, return_inverse=True)
        roots = np.array([g if g == FIXED else self.root(g) for g in groups.tolist()], dtype=np.int64)
        numbers: Ids = np.where(ids == FIXED, FIXED, roots[places.reshape(ids.shape)] * STRIDE + ids % STRIDE)
        return numbers

    @property
    def groups(self) -> set[int]:
        """Return every group, those that others stand for included."""
        return set(self.widths)

    def names(self) -> dict[int, list[str]]:
        """Return the layers of every group, under the group's root."""
        found: dict[int, list[str]] = {}
        for name, group in self._number.items():
            found.setdefault(self.root(group), []).append(name)
        return found

    def _whole(self, ours: int, theirs: int, pairs: Ids) -> bool:
        """Tell whether pairs of channels (2, n) are all those of two groups, each with its like."""
        width = self.widths[ours]
        whole = width == self.widths[theirs] == pairs.shape[1] and ours != theirs
        return bool(whole and (pairs == np.arange(width)).all())


def groups_of(ids: Ids) -> list[int]:
    """Return the groups that channels are of."""
    return [group for group in np.unique(ids // STRIDE).tolist() if group != FIXED]
