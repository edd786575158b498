"""The layers of a model whose weights its main graph does not store as one tensor, and why they stay in float."""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from micronet.onnx import graph_view as view
from micronet.onnx.float_nodes import graphs_in, has_layers, layers_inside, no_integer_form
from micronet.onnx.graph_view import GraphView
from micronet.onnx.metadata import reason_in
from micronet.onnx.ops import (
    CONTROL,
    CONVOLUTIONS,
    DEFORMABLE,
    INTEGER_CONVOLUTIONS,
    INTEGER_LAYERS,
    RECURRENT,
    RECURRENT_INTEGERS,
    WEIGHTED_OPS,
)
from micronet.quantization.config import NO_DEFORMABLE, RUN_TIME_WEIGHTS

Kind = Literal["convolutions", "linear", "recurrent"]


def kind_of(node: ir.Node) -> Kind:
    """Return the key under which ``count_layers`` counts a layer."""
    if node.op_type in RECURRENT | RECURRENT_INTEGERS:
        return "recurrent"
    return "convolutions" if node.op_type in CONVOLUTIONS | INTEGER_CONVOLUTIONS | {DEFORMABLE} else "linear"


def may_be(node: ir.Node, name: str) -> bool:
    """Return True if a node may be the layer of this name whose weight the forward computes: a call or a module."""
    return not name.endswith("()") or name.startswith("conv") == (kind_of(node) == "convolutions")


def other_layers(
    graph: GraphView, done: Collection[str], reasons: Mapping[str, str], computed: Mapping[str, str]
) -> Iterator[tuple[Kind, str, str | None]]:
    """Yield what ``count_layers`` takes for the layers that are not in ``graph.layers``.

    These are recurrent layers, integer operators, deformable convolutions and those whose weights are computed, and the
    layers in the bodies of branches and loops.

    Args:
        graph: The model.
        done: The names of the nodes that ONNX Runtime computes in integers.
        reasons: The layers that micronet left in float and why.
        computed: Those of them without a node of that name, whose weight the forward computes.
    """
    with_computed = set(computing_convolutions(graph))
    constants = view.computed_constants(graph.nodes)
    for node in graph.nodes:
        if node.op_type in RECURRENT:
            own = reason_in(reasons, str(node.name)) or no_integer_form(node.op_type)
            yield "recurrent", view.layer_name(node), None if node.name in done else own
        elif node.op_type in INTEGER_LAYERS:
            yield kind_of(node), view.layer_name(node), None
        elif node.op_type == DEFORMABLE:
            yield "convolutions", _owner(node), NO_DEFORMABLE
        elif node in with_computed:
            known = computed if node.inputs[1] in constants else {}
            own = next((why for name, why in known.items() if may_be(node, name)), RUN_TIME_WEIGHTS)
            why_float = reason_in(reasons, str(node.name)) or own
            yield "convolutions", view.layer_name(node), None if node.name in done else why_float
        elif node.op_type in CONTROL and has_layers(node):
            why = layers_inside(node.op_type)
            yield from ((kind_of(inner), str(node.name), why) for inner in _layers_in(node))


def computing_convolutions(graph: GraphView) -> list[ir.Node]:
    """Return the convolutions of a model whose weights are not stored."""
    with_weights = {each.node for each in graph.layers}
    return [node for node in graph.nodes if node.op_type in CONVOLUTIONS and node not in with_weights]


def _owner(node: ir.Node) -> str:
    """Return the name of the layer that a node's weight belongs to, or its own if the weight has no such name."""
    weight = str(node.inputs[1].name) if node.inputs[1] is not None else ""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else view.layer_name(node)


def _layers_in(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the layers with stored weights in the graphs that a node holds."""
    for inner in (each for graph in graphs_in(node) for each in graph):
        yield from _layers_in(inner)
        with_weights = inner.op_type in WEIGHTED_OPS and view.stored(inner, 1) is not None
        if with_weights or inner.op_type in RECURRENT | {DEFORMABLE}:
            yield inner
