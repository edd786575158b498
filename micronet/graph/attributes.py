"""Integers that a user's module holds as attributes and its forward uses as sizes, such as those of a split.

While a forward is traced, each may be an ``Attribute``, which knows where it comes from. If pruning needs another size,
it changes the attribute with the layers.
"""

import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from micronet.graph.leaves import is_leaf

RESHAPES = {torch.reshape, "reshape", "view"}  # (x, *sizes)
UNFLATTENS = {torch.unflatten, "unflatten"}  # (x, axis, sizes)
SPLITS = {torch.split, "split"}  # (x, size or sizes, axis)


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
        """Return a multiple that knows the attribute, unless it is 0."""
        if not _is_int(other):
            return NotImplemented
        product = int(self) * int(other)
        return _attribute(product, self.place, self.ratio * int(other)) if product else product

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


def read_attributes(network: fx.GraphModule) -> None:
    """Give a network the attributes that its graph was traced with, under names of its own, and let its code read them.

    As constants in its code, they could not be changed.
    """
    graph, names = network.graph, dict[Place, str]()

    def read(value: Any) -> Any:
        if not isinstance(value, Attribute):
            return value
        if value.place not in names:
            names[value.place] = _free_name(network, value.place)
            setattr(network, names[value.place], int(int(value) / value.ratio))
        node = graph.create_node("get_attr", names[value.place])
        for function, number in (operator.mul, value.ratio.numerator), (operator.floordiv, value.ratio.denominator):
            node = node if number == 1 else graph.call_function(function, (node, number))
        return node

    for node in list(graph.nodes):
        with graph.inserting_before(node):
            node.args, node.kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
    network.recompile()


def has_sizes(graph: fx.Graph, model: nn.Module) -> bool:
    """Return True if a network's graph has reshapes or splits with plain numbers as sizes: ``x.view(-1, 400)``."""
    calls = (_as_method(node, model) for node in graph.nodes)
    return any(any(map(_is_size, tree_leaves(args[_sizes(target)]))) for target, args in calls)


def read_sizes(network: fx.GraphModule) -> None:
    """Make the plain numbers that reshapes and splits have as sizes attributes of a network, which its code reads."""
    graph, numbers = network.graph, {kind: itertools.count(1) for kind in ("size", "split_size")}

    def read(kind: str, value: Any) -> Any:
        if not _is_size(value):
            return value
        name = next(each for each in (f"{kind}_{n}" for n in numbers[kind]) if not hasattr(network, each))
        setattr(network, name, value)
        return graph.create_node("get_attr", name)

    for node in list(graph.nodes):
        target, args = _as_method(node, network)
        place = _sizes(target)
        if args[place]:
            own = partial(read, "split_size" if target in SPLITS else "size")  # earlier files have no sizes of splits
            with graph.inserting_before(node):
                node.args = (*args[: place.start], *map_aggregate(args[place], own), *args[place.stop or len(args) :])
            if node.op == "call_module":
                node.op, node.target = "call_method", target
    network.recompile()


def _as_method(node: fx.Node, model: nn.Module) -> tuple[Any, tuple[Any, ...]]:
    """Return a node's target and arguments: of ``nn.Unflatten`` those of the tensor's method."""
    if node.op != "call_module":
        return node.target, node.args
    module: Any = model.get_submodule(str(node.target))
    if type(module) is nn.Unflatten and isinstance(module.dim, int):
        return "unflatten", (*node.args, module.dim, tuple(module.unflattened_size))
    return module, node.args


def _sizes(target: Any) -> slice:
    """Return which arguments of a reshape or a split are sizes."""
    if target in RESHAPES:
        return slice(1, None)
    return slice(2, None) if target in UNFLATTENS else slice(1, 2) if target in SPLITS else slice(0, 0)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 1


def _free_name(network: nn.Module, place: Place) -> str:
    owner, name, item = place
    own = "_".join([*filter(None, owner.split(".")), name, *([] if item is None else [str(item)])]).lstrip("_")
    while hasattr(network, own):
        own += "_"
    return own
