"""``len(x)`` of a tensor as a size that a recorded forward passes on; Python's own makes a plain integer of it."""

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_python_len = len


@contextmanager
def lengths_as_sizes() -> Iterator[None]:
    """Let ``len(x)`` mean ``x.size(0)`` in this context, which a recorder sees."""
    module: Any = builtins
    before, module.len = builtins.len, _length
    try:
        yield
    finally:
        module.len = before


def _length(value: Any, /) -> int:
    if isinstance(value, Tensor) and value.dim():
        return value.size(0)
    return _python_len(value)
