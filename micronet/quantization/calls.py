"""Calls with weights that stay in float, since no module holds a quantizer for them: their names and the reasons."""

from collections.abc import Collection
from operator import attrgetter

import torch
from torch import fx, nn

from micronet.graph import ops
from micronet.graph.computed import computed_from
from micronet.graph.layer_calls import CALLS, arguments_of
from micronet.graph.trace import Graph
from micronet.models.attention import weigh
from micronet.quantization.config import (
    FIXED_WEIGHT,
    FUNCTION_CALL,
    NO_DEFORMABLE,
    PRODUCT_OF_TWO,
    RUN_TIME_WEIGHTS,
    STORED_FACTOR,
)

COMPUTED = "its weight is computed"
COMPUTED_WEIGHT = f"{COMPUTED}; quantize with --mode ptq, then train with --mode qaft"

_ADDING = torch.addmm, torch.baddbmm, "addmm", "baddbmm"


def float_calls(graph: Graph, layers: Collection[str]) -> dict[str, str]:
    """Return the calls with weights or of two activations: layer, or call, -> why it stays float.

    ``layers``: the names of those that are called as modules.
    """
    found: dict[str, str] = {}
    for node in graph.fx.nodes:
        if node.op in ("call_function", "call_method") and ops.WEIGHTED.matches(node) and not _is_sum(node):
            name, why = _describe(graph, node, layers)
            found[name or f"{node.name}()"] = why
    return found


def _describe(graph: Graph, node: fx.Node, layers: Collection[str]) -> tuple[str, str]:
    """Return the layer that a call belongs to, or "", and why it stays float."""
    if sources := computed_from(node):
        name = sources[0].rpartition(".")[0]
        return ("", f"{COMPUTED} from that of {name}") if name in layers else (name, COMPUTED_WEIGHT)
    if ops.DEFORMABLE_CONVOLUTION.matches(node):
        weight = next((str(read.target) for read in node.all_input_nodes if read.op == "get_attr"), "")
        return weight.rpartition(".")[0], NO_DEFORMABLE
    if ops.WEIGHTED_FUNCTIONS.matches(node):
        weights = arguments_of(node)["weight"] if node.target in CALLS else None
        computed = isinstance(weights, fx.Node) and not _is_stored(graph, weights)
        fixed = isinstance(weights, fx.Node) and _is_fixed(graph, weights)
        return "", RUN_TIME_WEIGHTS if computed else FIXED_WEIGHT if fixed else FUNCTION_CALL
    return "", STORED_FACTOR if any(_is_stored(graph, each) for each in _factors(node)) else PRODUCT_OF_TWO


def _factors(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a product multiplies, without those that it adds: a bias, or attention's mask."""
    if ops.ATTENTION.matches(node):
        by_order = node.args[: 2 if node.target is weigh else 3]
        given = [*by_order, *map(node.kwargs.get, ("query", "key", "value"))]
        return [each for each in given if isinstance(each, fx.Node)]
    added = (node.args[0] if node.args else node.kwargs.get("input")) if node.target in _ADDING else None
    return [each for each in node.all_input_nodes if each is not added]


def _is_stored(graph: Graph, node: fx.Node) -> bool:
    """Return True for a stored tensor, a part of it, whatever its bounds are, and what is computed from such alone."""
    while node not in graph.stored and ops.PART.matches(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node in graph.stored


def _is_fixed(graph: Graph, node: fx.Node) -> bool:
    """Return True for a stored tensor that no training changes."""
    return node.op == "get_attr" and not isinstance(attrgetter(str(node.target))(graph.model), nn.Parameter)


def _is_sum(node: fx.Node) -> bool:
    """Return True for an einsum of one tensor, which multiplies nothing."""
    return ops.EINSUM.matches(node) and len(node.args) == 2 and isinstance(node.args[1], fx.Node)
