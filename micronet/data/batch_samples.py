"""Samples of batches in memory; a batch's N labels are in any structure of tensors, lists, tuples and dicts."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from numpy import generic, ndarray
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from micronet.errors import MicronetError, count


class BatchSamples:
    """Samples of batches: ``(inputs, target)`` by their index, without copies of the batches.

    Args:
        inputs: The inputs of each batch, tensors of shape (N, ...).
        targets: The labels of each batch, as ``settle_labels`` returns them; None: no labels.
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
        """A hash of the inputs and the labels."""
        found = hashlib.sha256()
        for path, each in tree_leaves_with_path((tuple(self._inputs), self._targets)):
            array = each.contiguous().numpy() if isinstance(each, Tensor) else each
            if isinstance(array, ndarray) and not array.dtype.hasobject:
                known: Any = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
            else:
                known = each.tolist() if isinstance(each, (ndarray, generic)) else each
            found.update(f"{keystr(path)} {known!r}\n".encode(errors="surrogatepass"))
        return found.digest()

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Any]:
        batch = bisect_right(self._ends, index)
        row = index - (self._ends[batch - 1] if batch else 0)
        target = None if self._targets is None else _row(self._targets[batch], row)
        return tuple(each[row] for each in self._inputs[batch]), target


def settle_labels(labels: Any, samples: int, number: int, *, are_items: bool = False) -> Any:
    """Return a batch's labels, in which a list holds one label per sample, and a tuple one column per kind of label.

    Args:
        labels: A tensor or array (N, ...), a list or tuple of N labels, a list or tuple of columns, each a tensor
            (N, ...), or a dict of any of these.
        samples: The number of samples N.
        number: The batch's, for messages.
        are_items: Whether the batch itself has the columns as items, as in ``(x, boxes, classes)``.

    Raises:
        MicronetError: There is not one label per sample, or a tuple can be read either way.
    """
    if isinstance(labels, Mapping):
        return {key: settle_labels(each, samples, number) for key, each in labels.items()}
    if are_items:
        return tuple(settle_labels(each, samples, number) for each in labels)
    if _is_array(labels) and len(labels) == samples:
        return labels
    if isinstance(labels, (tuple, list)):
        are_columns = _share_a_length(labels) and len(labels[0]) == samples
        # Labels of one kind have the same type, so boxes and classes are columns even of two samples.
        are_labels = len(labels) == samples and not (are_columns and len({(x.dtype, x.ndim) for x in labels}) > 1)
        if are_columns and are_labels and isinstance(labels, tuple):
            raise MicronetError(
                f"the labels of batch {number} are a tuple of {count(samples, 'tensor')} of length {samples}, so each "
                "can belong to a sample or be a kind of label of all; pass a list for the former, a dict for the latter"
            )
        if are_labels or are_columns:
            return list(labels) if are_labels else tuple(labels)
    length = length_of(labels)
    raise MicronetError(
        f"batch {number} of the data in memory has {count(samples, 'sample')}, but "
        f"{'no list of labels' if length is None else count(length, 'label')} beside the inputs; expected one label "
        "per sample"
    )


def length_of(value: Any) -> int | None:
    """Return the number of samples in labels or inputs of any structure; None if its parts differ, or have none."""
    if isinstance(value, (Tensor, ndarray)):
        return len(value) if value.ndim else None
    if isinstance(value, (tuple, list)):
        return len(value[0]) if _share_a_length(value) else len(value)
    lengths = {length_of(each) for each in value.values()} if isinstance(value, Mapping) else set()
    return lengths.pop() if len(lengths) == 1 else None


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, ndarray)) and value.ndim > 0


def _share_a_length(values: Sequence[Any]) -> bool:
    """Return True if a tuple or list holds tensors of one length, such as boxes and classes."""
    return bool(values) and all(map(_is_array, values)) and len(set(map(len, values))) == 1


def _row(value: Any, index: int) -> Any:
    """Return the labels of one sample."""
    if isinstance(value, Mapping):
        return {key: _row(each, index) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_row(each, index) for each in value)
    return value[index]
