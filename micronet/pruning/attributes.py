"""Integers that a user's module holds as attributes and its forward uses as sizes, such as those of a split.

While a forward is traced, each is an ``Attribute``, which knows where it comes from. If other widths need another size,
the attribute is changed with the layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from micronet.graph.leaves import is_leaf

_SPLITS = {torch.split, "split"}


class Place(NamedTuple):
    """Where an integer is: an attribute of a module, or an item of a list or tuple that is one."""

    owner: str
    name: str
    item: int | None


class Attribute(int):
    """An integer that a module holds as an attribute, and where."""

    place: Place

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy it as a plain integer."""
        return int, (int(self),)


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


def _attribute(value: int, place: Place) -> Attribute:
    made = Attribute(value)
    made.place = place
    return made


class Attributes:
    """The attributes of a network for some widths of its layers; ``changed``: those that these widths need."""

    def __init__(self) -> None:
        self.changed: dict[Place, int] = {}

    def resolve(self, values: Any) -> Any:
        """Return values with plain integers in place of attributes."""

        def resolve(value: Any) -> Any:
            if not isinstance(value, Attribute):
                return value
            return self.changed.get(value.place, int(value))

        return tree_map(resolve, values)

    def fitted(self, sizes: list[Attribute], total: int) -> list[int]:
        """Return the sizes of a split's parts, changed in proportion to their total if that is exact."""
        whole = sum(sizes)
        if not any(size * total % whole for size in sizes):
            new = {size.place: size * total // whole for size in sizes}
            self.changed = new | self.changed  # another split may have set them
        return [self.changed.get(size.place, int(size)) for size in sizes]


def split_sizes(node: fx.Node) -> list[Attribute]:
    """Return the sizes of a split's parts if all are attributes, else an empty list."""
    if node.target not in _SPLITS:
        return []
    own = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    sizes = list(own) if isinstance(own, (list, tuple)) else []
    return [size for size in sizes if isinstance(size, Attribute)] if all(map(_is_attribute, sizes)) else []


def _is_attribute(value: Any) -> bool:
    return isinstance(value, Attribute)


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
