"""What a network returns, as named tensors: from tuples, lists, dicts, named tuples, dataclasses and other objects."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


def tensors_in(returned: Any) -> list[Tensor]:
    """Return the tensors in what a network returned, in its order; other values are left out."""
    return [tensor for _, tensor in _named(returned, "", ())]


def output_names(returned: Any) -> list[str]:
    """Return the tensors' names: the keys, fields and positions that lead to each, joined by dots.

    A network's only tensor has an empty name if it is returned as it is. Where no key or field leads to a tensor, as in
    a tuple, its name is a number from 1, as in ``output_2``.
    """
    names = [name for name, _ in _named(returned, "", ())]
    return [f"output_{index}" if _is_number(name) else name for index, name in enumerate(names, 1)]


def other_values(returned: Any) -> list[Any]:
    """Return the strings, numbers and so on beside the tensors in what a network returned."""
    parts = _parts(returned)
    if parts is None:
        return [returned] if isinstance(returned, _PLAIN) else []
    return [value for _, part in parts for value in other_values(part)]


def _named(value: Any, name: str, inside: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if any(value is outer for outer in inside):  # objects may refer to each other
        return
    for key, part in _parts(value) or ():
        yield from _named(part, f"{name}.{key}".strip("."), (*inside, value))


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the named parts of a structure, or None if a value has none."""
    if isinstance(value, (np.ndarray, np.generic)):
        return [("", torch.as_tensor(value))]
    if isinstance(value, (Tensor, type, nn.Module, *_PLAIN)) or callable(value):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return list(getattr(value, "__dict__", {}).items())


def _is_number(name: str) -> bool:
    return name != "" and all(part.isdigit() for part in name.split("."))
