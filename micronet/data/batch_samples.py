"""Samples of batches in memory; a batch's N labels are in any structure of tensors, lists, tuples and dicts."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from micronet.errors import MicronetError, count


class BatchSamples:
    """Samples of batches: ``(inputs, target)`` by their index, without copies of the batches.

    Args:
        inputs: The inputs of each batch, tensors of shape (N, ...).
        targets: The labels of each batch, N of them in any structure of tensors, lists and dicts; None: no labels.
        names: The inputs' names, if the network takes them by name.
        stacked: Whether the targets of a batch are one tensor; otherwise, they are a list.
    """

    def __init__(
        self, inputs: Sequence[tuple[Tensor, ...]], targets: list[Any] | None, names: list[str] | None, *, stacked: bool
    ) -> None:
        self.names, self._inputs, self._targets = names, inputs, targets
        self._ends = list(accumulate(len(each[0]) for each in inputs))
        self.collate = torch.stack if stacked and targets is not None else list

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def digest(self) -> bytes:
        """A hash of the inputs and of the labels that are tensors."""
        found = hashlib.sha256()
        for each in tree_leaves((self._inputs, self._targets)):
            if isinstance(each, Tensor):
                found.update(each.contiguous().numpy().tobytes())
        return found.digest()

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Any]:
        batch = bisect_right(self._ends, index)
        row = index - (self._ends[batch - 1] if batch else 0)
        target = None if self._targets is None else _row(self._targets[batch], row)
        return tuple(each[row] for each in self._inputs[batch]), target


def length_of(value: Any) -> int | None:
    """Return the number of samples in labels or inputs of any structure; None if its parts differ, or have none."""
    if isinstance(value, (Tensor, ndarray)):
        return len(value) if value.ndim else None
    if isinstance(value, (tuple, list)) and not _is_structure(value):
        return len(value)
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else []
    lengths = {length_of(each) for each in parts}
    return lengths.pop() if len(lengths) == 1 else None


def _is_structure(value: Any) -> bool:
    """Return True if a tuple or list holds tensors of one length, such as boxes and classes, not an item per sample."""
    tensors = all(isinstance(each, (Tensor, ndarray)) and each.ndim for each in value)
    return bool(value) and tensors and len({len(each) for each in value}) == 1


def _row(value: Any, index: int) -> Any:
    """Return the labels of one sample."""
    if isinstance(value, Mapping):
        return {key: _row(each, index) for key, each in value.items()}
    if isinstance(value, (tuple, list)) and _is_structure(value):
        return tuple(each[index] for each in value)
    return value[index]


def check_length(labels: Any, samples: int, number: int) -> None:
    """Raise MicronetError unless batch ``number`` has one label per sample, or none at all."""
    if labels is None or length_of(labels) == samples:
        return
    length = length_of(labels)
    raise MicronetError(
        f"batch {number} of the data in memory has {count(samples, 'sample')}, but "
        f"{'no list of labels' if length is None else count(length, 'label')} beside the inputs; expected one label "
        "per sample"
    )
