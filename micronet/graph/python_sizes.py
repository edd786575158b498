"""What Python makes of sizes, ``len(x)`` and ``int(size / 4)``, as sizes that a recorded forward passes on."""

import builtins
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from micronet.graph.leaves import is_leaf
from micronet.graph.size import Quotient, Root, Size

_python_len = len
_OTHERS = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "scipy", "micronet"}  # they keep Python's int


@contextmanager
def python_sizes(model: nn.Module, *, ints: bool = True) -> Iterator[None]:
    """Let ``len(x)`` mean ``x.size(0)`` in this context, which a recorder sees.

    ``ints``: also let ``int`` in the files of the network's classes give sizes for sizes and their quotients.
    """
    module: Any = builtins
    spaces = _namespaces(model) if ints else []
    before, module.len = builtins.len, _length
    for space in spaces:
        space["int"] = _Int
    try:
        yield
    finally:
        module.len = before
        for space in spaces:
            del space["int"]


def _length(value: Any, /) -> int:
    if isinstance(value, Tensor) and value.dim():
        return value.size(0)
    return _python_len(value)


class _IntType(type):
    """The type of a stand-in for ``int``."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], (Quotient, Root)):
            return math.trunc(args[0])
        return args[0] if len(args) == 1 and isinstance(args[0], Size) else int(*args, **options)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)


class _Int(metaclass=_IntType):
    """Stands in for ``int``."""


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of the files that hold a network's classes, and of those whose functions they use."""
    forwards = {type(module).forward for module in model.modules() if not is_leaf(module)}
    found: dict[int, dict[str, Any]] = {}
    for forward in forwards:
        space = getattr(forward, "__globals__", {})
        used = [value.__globals__ for value in space.values() if isinstance(value, FunctionType)]
        found |= {id(each): each for each in (space, *used)}
    own = (space for space in found.values() if str(space.get("__name__", "")).partition(".")[0] not in _OTHERS)
    return [space for space in own if "int" not in space]
