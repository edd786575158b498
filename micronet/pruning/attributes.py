"""The sizes that a user's modules hold and pruning changes with the layers."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph.attributes import Attribute, Place


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
