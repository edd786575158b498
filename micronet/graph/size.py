"""Integers that know the node of a graph that computes them."""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from torch import fx

from micronet.graph.ops import METADATA_ATTRIBUTES

_LARGEST_PART = 1 << 20  # of a ratio; a float such as 0.1 has larger ones, and is not what it says


class Size(int):
    """A size of a recorded tensor, or integer arithmetic on sizes, and the node that computes it."""

    node: fx.Node

    def __new__(cls, value: int, node: fx.Node) -> "Size":
        """Return the integer ``value``, computed by ``node``."""
        size = super().__new__(cls, value)
        size.node = node
        return size

    def __truediv__(self, other: Any) -> Any:
        """Return a quotient that knows the size, if the divisor is a plain number."""
        return _quotient(self, Fraction(1), other, divide=True) or int(self) / other

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        """Return a power; a square root knows the size."""
        if type(other) is float and other == 1 / 2:
            root = Root(int(self) ** other)
            root.size = self
            return root
        return pow(int(self), other, modulus)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy it as a plain integer."""
        return int, (int(self),)


class Root(float):
    """The square root of a size. It becomes a size again by ``math.floor``, ``math.trunc`` or ``int``."""

    size: Size

    def __floor__(self) -> Size:
        """Round down."""
        return Size(math.isqrt(int(self.size)), self.size.node.graph.call_function(math.isqrt, (self.size.node,)))

    __trunc__ = __floor__

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Copy it as a plain number."""
        return float, (float(self),)


class Quotient(float):
    """A size times a ratio. It becomes a size again by ``math.ceil``, ``math.floor``, ``math.trunc`` or ``int``."""

    size: Size
    ratio: Fraction

    def __mul__(self, other: Any) -> Any:
        """Return a multiple that knows the size, if the factor is a plain number."""
        return _quotient(self.size, self.ratio, other, divide=False) or float.__mul__(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        """Return a fraction that knows the size, if the divisor is a plain number."""
        return _quotient(self.size, self.ratio, other, divide=True) or float.__truediv__(self, other)

    def __ceil__(self) -> Size:
        """Round up."""
        return self._rounded(up=True)

    def __floor__(self) -> Size:
        """Round down."""
        return self._rounded(up=False)

    __trunc__ = __floor__  # sizes are not negative

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Copy it as a plain number."""
        return float, (float(self),)

    def _rounded(self, *, up: bool) -> Size:
        ratio = self.ratio.numerator, self.ratio.denominator, up
        node = self.size.node.graph.call_function(scaled_size, (self.size.node, *ratio))
        return Size(scaled_size(int(self.size), *ratio), node)


def scaled_size(size: int, times: int, over: int, up: bool) -> int:
    """Return ``size * times / over``, rounded up or down; a node of its own in graphs."""
    return -(-size * times // over) if up else size * times // over


fx.wrap("scaled_size")


def _quotient(size: Size, ratio: Fraction, other: Any, *, divide: bool) -> Quotient | None:
    """Return a size's multiple, multiplied or divided by a plain positive number; None for any other."""
    if type(other) not in (int, float) or not 0 < other < _LARGEST_PART or int(size) <= 0:
        return None
    ratio = ratio / Fraction(other) if divide else ratio * Fraction(other)
    if max(ratio.numerator, ratio.denominator) > _LARGEST_PART:
        return None
    quotient = Quotient(int(size) * ratio)
    quotient.size, quotient.ratio = size, ratio
    return quotient


def _arithmetic(name: str, *, reflected: bool) -> Callable[[Size, Any], Any]:
    apply = getattr(operator, name)

    def compute(size: Size, other: Any) -> Any:
        if type(other) is float and name == "mul":
            return _quotient(size, Fraction(1), other, divide=False) or int(size) * other
        if not isinstance(other, int):
            return NotImplemented
        left, right = (other, size) if reflected else (size, other)
        nodes = tuple(getattr(value, "node", value) for value in (left, right))
        return Size(apply(int(left), int(right)), size.node.graph.call_function(apply, nodes))

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Size, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(Size, f"__r{_name}__", _arithmetic(_name, reflected=True))


SIZE_ARITHMETIC = {
    getattr,
    scaled_size,
    math.isqrt,
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
}


def is_size(node: fx.Node) -> bool:
    """Return True if a node computes facts of a tensor, such as its shape, an item of that, or arithmetic on such."""
    if node.target is getattr:
        return node.args[1] in METADATA_ATTRIBUTES
    if node.op == "call_method":
        return node.target in ("size", "numel")
    inputs = node.all_input_nodes
    return node.op == "call_function" and node.target in SIZE_ARITHMETIC and bool(inputs) and all(map(is_size, inputs))
