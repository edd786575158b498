"""Integers that know the node of a graph that computes them."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx


class Size(int):
    """A size of a recorded tensor, or integer arithmetic on sizes, and the node that computes it."""

    node: fx.Node

    def __new__(cls, value: int, node: fx.Node) -> "Size":
        """Return the integer ``value``, computed by ``node``."""
        size = super().__new__(cls, value)
        size.node = node
        return size

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy it as a plain integer."""
        return int, (int(self),)


def _arithmetic(name: str, *, reflected: bool) -> Callable[[Size, Any], Any]:
    apply = getattr(operator, name)

    def compute(size: Size, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        left, right = (other, size) if reflected else (size, other)
        nodes = tuple(getattr(value, "node", value) for value in (left, right))
        return Size(apply(int(left), int(right)), size.node.graph.call_function(apply, nodes))

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Size, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(Size, f"__r{_name}__", _arithmetic(_name, reflected=True))
