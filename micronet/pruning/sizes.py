"""The sizes that splits and reshapes are called with, changed with the widths where modules hold them as attributes.

The sizes of a split's parts grow with their total. A reshape that does not fit has one of its sizes changed. If
attention reads the result, that is the number of heads, because part of a head cannot be cut.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph.attributes import RESHAPES, SPLITS, UNFLATTENS, Attribute
from micronet.pruning.attributes import Attributes
from micronet.pruning.ids import FIXED, Ids, distinct
from micronet.pruning.node_call import NodeCall


def fit_sizes(call: NodeCall, attributes: Attributes) -> NodeCall:
    """Return a split or reshape with sizes that fit its input, if changed attributes make that possible."""
    if call.module is not None:  # whose name may be that of a method
        return call
    if sizes := split_sizes(call.node):
        _fit_split(call, sizes, attributes)
    elif call.node.target in RESHAPES:
        _fit_reshape(call, attributes)
    elif call.node.target in UNFLATTENS:
        _fit_unflatten(call, attributes)
    else:
        return call
    args, kwargs = attributes.resolve(call.unresolved)
    return replace(call, args=args, kwargs=kwargs)


def split_sizes(node: fx.Node) -> list[Attribute]:
    """Return the sizes of a split's parts, or the one size of all parts, if all are attributes, else an empty list."""
    if node.target not in SPLITS:
        return []
    sizes = tree_leaves(node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None))
    found = [size for size in sizes if isinstance(size, Attribute)]
    return found if len(found) == len(sizes) else []


def channels_counted(call: NodeCall, values: Mapping[fx.Node, Any], recorded: Mapping[tuple[int, str], Any]) -> Ids:
    """Return the channels whose number a call depends on, where it is not the one in the whole network.

    ``values``: the results of the nodes before the call; ``recorded``: what they are in the whole network.
    """
    found: list[Ids] = [np.empty(0, np.int64)]
    seen: set[fx.Node] = set()
    nodes = [call.node]
    while nodes:
        for node in set(nodes.pop().all_input_nodes) - seen:
            seen.add(node)
            if shapes(values[node]) == shapes(recorded[call.key[0], node.name]):
                continue
            ids = [distinct(leaf) for leaf in tree_leaves(values[node]) if isinstance(leaf, Tensor)]
            if all((each == FIXED).all() for each in ids):
                nodes.append(node)
            found += ids
    channels = np.concatenate(found)
    return channels[channels > FIXED]


def shapes(value: Any) -> Any:
    """Return a value with the shape of each tensor in its place."""
    return tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, value)


def _fit_split(call: NodeCall, sizes: list[Attribute], attributes: Attributes) -> None:
    total = call.tensors[0].size(call.argument(2, "dim", 0))
    share = Fraction(total, sum(sizes) if len(sizes) > 1 else int(sizes[0]) * len(call.fixed))
    fitting = [int(size) * share for size in sizes]
    if all(size.denominator == 1 for size in fitting):
        for size, new in zip(sizes, fitting, strict=True):
            attributes.fit(size, new)


def _fit_reshape(call: NodeCall, attributes: Attributes) -> None:
    given: list[Any] = tree_leaves(call.unresolved)[1:]  # the sizes behind the tensor
    sizes: list[int] = attributes.resolve(given)
    own = [size for size in given if isinstance(size, Attribute)]
    if not own or not all(isinstance(size, int) for size in sizes) or 0 in sizes:
        return
    known = torch.Size(size for size in sizes if size != -1).numel()
    share = Fraction(call.tensors[0].numel(), known)
    if sizes[0] == -1 and call.fixed.size(0) == call.tensors[0].size(0):  # the samples, whose number does not change
        share /= call.fixed.size(0)
    elif -1 in sizes:  # which would take up any change
        place = sizes.index(-1)
        is_heads = call.tensors[0].dim() - 1 <= place < len(sizes) - 1  # (N, L, -1, head's width)
        share = share / call.fixed.size(place) if call.before_heads and not is_heads else Fraction(1)
    if share != 1:
        if call.before_heads:  # the number of heads, which stands before their width, or the first one
            own = [*given[-2:-1], *own]
        else:  # the one that becomes an axis of the input, the maps' channels, or the last one
            maps = given[1:2] if len(sizes) > 3 else []
            wanted = [share * attributes.value(size) in call.tensors[0].shape for size in own]
            own = [size for size, fits in zip(own, wanted, strict=True) if fits] + [*maps, *reversed(own)]
        any(attributes.fit(size, share * attributes.value(size)) for size in own if isinstance(size, Attribute))


def _fit_unflatten(call: NodeCall, attributes: Attributes) -> None:
    axis, given = call.argument(1, "dim", 0), tree_leaves(call.unresolved)[2:]
    sizes: list[int] = attributes.resolve(given)
    if -1 in sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        return
    share = Fraction(call.tensors[0].size(axis), math.prod(sizes))
    if share != 1:  # the first: the channels of maps, or the number of heads
        any(attributes.fit(size, share * attributes.value(size)) for size in given if isinstance(size, Attribute))
