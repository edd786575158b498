"""Integers that a user's module holds as attributes and its forward uses as sizes, such as those of a split.

While a forward is traced, each is an ``Attribute``, which knows where it comes from. If other widths need another size,
the attribute is changed with the layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph.leaves import is_leaf


class Place(NamedTuple):
    """Where an integer is: an attribute of a module, or an item of a list or tuple that is one."""

    owner: str
    name: str
    item: int | None


class Attribute(int):
    """An integer that a module holds as an attribute, or a multiple or fraction of it, and where the attribute is."""

    place: Place
    ratio: Fraction

    def __mul__(self, other: Any) -> Any:
        """Return a multiple that knows the attribute."""
        return (
            _attribute(int(self) * int(other), self.place, self.ratio * int(other))
            if _is_int(other)
            else NotImplemented
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        """Return a fraction that knows the attribute, if it is exact."""
        if not _is_int(other) or not other or int(self) % int(other):
            return int(self) // other
        return _attribute(int(self) // int(other), self.place, self.ratio / int(other))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy it as a plain integer."""
        return int, (int(self),)


def _is_int(value: Any) -> bool:
    return type(value) in (int, Attribute)


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Turn the integers that the user's modules hold into ``Attribute``s in this context."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for owner, module in model.named_modules():
        if is_leaf(module):
            continue
        new = {name: _marked(owner, name, value) for name, value in vars(module).items() if not name.startswith("_")}
        changed = {name: value for name, value in new.items() if value is not vars(module)[name]}
        before.append((vars(module), {name: vars(module)[name] for name in changed}))
        vars(module).update(changed)
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.update(values)


def _marked(owner: str, name: str, value: Any) -> Any:
    if type(value) is int:
        return _attribute(value, Place(owner, name, None))
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(_attribute(item, Place(owner, name, index)) for index, item in enumerate(value))
    return value


def _attribute(value: int, place: Place, ratio: Fraction = Fraction(1)) -> Attribute:
    made = Attribute(value)
    made.place, made.ratio = place, ratio
    return made


class Attributes:
    """The attributes of a network for some widths of its layers; ``changed``: those that these widths need."""

    def __init__(self) -> None:
        self.changed: dict[Place, int] = {}
        self._read: dict[Place, int] = {}

    def resolve(self, values: Any) -> Any:
        """Return values with plain integers in place of attributes."""
        return tree_map(lambda value: self.value(value) if isinstance(value, Attribute) else value, values)

    def read(self, values: Any) -> None:
        """Remember what an operation has read: these attributes cannot be changed any more."""
        for value in tree_leaves(values):
            if isinstance(value, Attribute):
                self._read[value.place] = self._base(value)

    def fit(self, attribute: Attribute, size: Fraction) -> bool:
        """Change an attribute to a size; return False if it cannot have it, or another operation has read another."""
        base = size / attribute.ratio
        known = self._read.get(attribute.place, self.changed.get(attribute.place, base))
        if base.denominator > 1 or base < 1 or base != known:
            return False
        if base != int(attribute) / attribute.ratio:
            self.changed[attribute.place] = int(base)
        return True

    def value(self, attribute: Attribute) -> int:
        """Return an attribute's size for these widths."""
        return int(self._base(attribute) * attribute.ratio)

    def _base(self, attribute: Attribute) -> int:
        return self.changed.get(attribute.place, int(int(attribute) / attribute.ratio))


def set_attributes(model: nn.Module, changed: Mapping[Place, int]) -> dict[str, dict[str, Any]]:
    """Set attributes of a network's modules; return the new values by module and name, as a record keeps them."""
    result: dict[str, dict[str, Any]] = {}
    for place, value in changed.items():
        owner = model.get_submodule(place.owner)
        new: Any = value
        if place.item is not None:
            new = list(getattr(owner, place.name))
            new[place.item] = value
        set_attribute(owner, place.name, new)
        result.setdefault(place.owner, {})[place.name] = new
    return result


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set a size that a module holds: a public integer attribute, or a list or tuple of integers, to no larger ones.

    Raises ValueError for anything else, which a damaged file may name.
    """
    old = None if name.startswith("_") else vars(module).get(name)
    values, olds = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (value, old))
    integers = all(isinstance(x, int) and not isinstance(x, bool) for x in (*values, *olds))
    if not integers or len(values) != len(olds) or not all(1 <= x <= y for x, y in zip(values, olds, strict=True)):
        raise ValueError(f"{name} of {type(module).__name__} cannot be set to {value}")
    setattr(module, name, type(old)(values) if isinstance(old, (list, tuple)) else value)
