"""Labels of a batch in memory: N of them in any structure of tensors, lists, tuples and dicts."""

from collections.abc import Mapping
from typing import Any

from numpy import ndarray
from torch import Tensor

from micronet.errors import MicronetError, count


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


def row_of(value: Any, index: int) -> Any:
    """Return the labels of one sample."""
    if isinstance(value, Mapping):
        return {key: row_of(each, index) for key, each in value.items()}
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
