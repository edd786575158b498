"""The sizes of tensors that an ONNX network computes, bounded before anyone computes them."""

import math
from collections import ChainMap, Counter
from graphlib import TopologicalSorter
from typing import Any

import onnx
from onnx import TensorProto
from onnx.inliner import inline_local_functions

from micronet.onnx.stored import inner_graphs, node_lists, stored_tensors

MAX_VALUE_BYTES = 2**31  # of one tensor that a network computes: as much as ONNX allows a stored one
MAX_EXPANDED_BYTES = 2**26  # that calls of functions may add to a graph
NODE_BYTES = 256  # a node in memory, without its attributes
SHAPE_BYTES = 1024  # a stored tensor that says shapes is smaller
LONGEST_SHAPE = 256  # numbers of a vector that is followed from node to node, as shapes are
# Operators whose results ONNX follows number by number (its data propagation).
FOLLOWED = {"Add", "Sub", "Mul", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Range"}
HIDDEN = "micronet.hidden"  # a domain of operators that ONNX does not know


class TooLargeError(ValueError):
    """A network that computes or contains more than is allowed."""


def declare_outputs(proto: onnx.ModelProto) -> bool:
    """Give outputs without a type or a shape the inferred one, in place; ONNX requires them, ONNX Runtime does not.

    Returns:
        Whether there were any such outputs.
    """
    bare = [value for value in proto.graph.output if not _is_declared(value.type)]
    if bare:
        _check_functions(proto)
        known = {value.name: value.type for value in _inferred(_outline(proto)).graph.output}
        for value in bare:
            value.type.CopyFrom(known[value.name])
    return bool(bare)


def _is_declared(kind: onnx.TypeProto) -> bool:
    which = kind.WhichOneof("value")
    return which is not None and (which != "tensor_type" or kind.tensor_type.HasField("shape"))


def _inferred(outline: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(inline_local_functions(outline) if outline.functions else outline)


def check_computed(proto: onnx.ModelProto) -> None:
    """Raise TooLargeError if a tensor that the network computes would take more than MAX_VALUE_BYTES.

    A few bytes can ask for any number of values (ConstantOfShape, Pad, Resize, RandomNormal, …), so it is the inferred
    shapes that count, not the operators. Shapes that depend on an input's values are unknown.
    """
    _check_functions(proto)
    sized = _inferred(_outline(proto))
    _check_sizes(sized)
    _hide_vectors(sized.graph, ChainMap())
    sized.opset_import.append(onnx.helper.make_opsetid(HIDDEN, 1))
    _check_sizes(onnx.shape_inference.infer_shapes(sized, data_prop=True))


def _check_functions(proto: onnx.ModelProto) -> None:
    """Raise TooLargeError if calls of functions would expand to too many nodes, ValueError if one calls itself."""
    bodies = {_called(function): function for function in proto.functions}
    calls = {
        key: Counter(_called(node) for part in node_lists(body) for node in part.node) for key, body in bodies.items()
    }
    sizes: dict[Any, int] = {}
    for key in TopologicalSorter({key: each.keys() & bodies.keys() for key, each in calls.items()}).static_order():
        size = bodies[key].ByteSize() + sum(number * sizes.get(each, NODE_BYTES) for each, number in calls[key].items())
        sizes[key] = min(size, 2**63)
    added = sum(sizes.get(_called(node), 0) for part in node_lists(proto.graph) for node in part.node)
    if added > MAX_EXPANDED_BYTES + sum(function.ByteSize() for function in proto.functions):
        raise TooLargeError(f"its functions expand to more than {MAX_EXPANDED_BYTES // NODE_BYTES:,} nodes, the limit")


def _called(node: Any) -> tuple[str, str, str]:
    """Return what identifies a function, or the function or operator that a node calls."""
    name = node.op_type if isinstance(node, onnx.NodeProto) else node.name
    return "" if node.domain == "ai.onnx" else node.domain, name, node.overload


def _check_sizes(proto: onnx.ModelProto) -> None:
    for graph in node_lists(proto.graph):
        for value in (*graph.value_info, *graph.output):
            if not value.type.tensor_type.elem_type:
                continue
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            known = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
            if math.prod(known) * kind.itemsize > MAX_VALUE_BYTES:
                size = f"{math.prod(known):,} values ({kind})"
                raise TooLargeError(f"{value.name} has {size}, and no tensor may take more than 2 GiB")


def _hide_vectors(graph: onnx.GraphProto, outer: ChainMap[str, float]) -> None:
    """Make operators unknown, in place, that read or make vectors of more than LONGEST_SHAPE numbers.

    ONNX's data propagation would keep every number, and a chain of Concat(s, s) doubles them with each node. Their
    inferred shapes stay. A length that is not known yet is taken to be as large as it can be.
    """
    own: dict[str, float] = {}
    lengths = ChainMap(own, *outer.maps)
    followed = {name for node in graph.node if node.op_type in FOLLOWED for name in node.output}
    for value in (*graph.input, *graph.value_info, *graph.output):
        own |= _length(value, value.name in followed)
    own |= {each.name: _stored_length(each) for each in graph.initializer}
    for node in graph.node:
        read = [lengths.get(name, math.inf) for name in node.input if name and node.op_type != "Range"]
        most = math.inf
        if node.op_type == "Shape":
            most = LONGEST_SHAPE
        elif node.op_type in FOLLOWED and read:
            most = sum(read) if node.op_type == "Concat" else max(read)
        made = [own.setdefault(name, most) for name in node.output if name]
        if node.op_type in FOLLOWED and max([*made, *read], default=0) > LONGEST_SHAPE:
            node.domain = HIDDEN
        for inner in inner_graphs(node):
            _hide_vectors(inner, lengths)


def _stored_length(tensor: TensorProto) -> int:
    """Return how many numbers an initializer has, 1 if the outline left them out."""
    fields = tensor.ListFields()
    return math.prod(tensor.dims) if any(field.name.endswith("_data") for field, _ in fields) else 1


def _length(value: onnx.ValueInfoProto, followed: bool) -> dict[str, float]:
    """Return how many numbers ONNX may follow in a tensor, as {name: number}; {} if its shape does not tell.

    Only vectors are followed from where they are made, but FOLLOWED operators may make matrices of them.
    """
    kind = value.type.tensor_type
    if not kind.HasField("shape") or (followed and len(kind.shape.dim) > 1):
        return {}
    if len(kind.shape.dim) != 1:
        return {value.name: 1}
    return {value.name: kind.shape.dim[0].dim_value} if kind.shape.dim[0].HasField("dim_value") else {}


def _outline(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the bytes of its large weights, on which no shape depends.

    Branches and loop bodies get copies of the small constants outside that they read, which inference would not see.
    """
    graph = proto.graph
    outline = onnx.ModelProto(
        ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions,
        graph=onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output),
    )  # fmt: skip
    outline.graph.sparse_initializer.extend(graph.sparse_initializer)
    for tensor in graph.initializer:
        empty = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        outline.graph.initializer.append(tensor if tensor.ByteSize() <= SHAPE_BYTES else empty)
    for whole, part in zip((graph, *proto.functions), (outline.graph, *outline.functions), strict=True):
        small = {name: tensor for name, tensor in stored_tensors(whole) if tensor.ByteSize() <= SHAPE_BYTES}
        for inner in (each for each in node_lists(part) if isinstance(each, onnx.GraphProto)):
            own = {tensor.name for tensor in inner.initializer} | {value.name for value in inner.input}
            own |= {name for node in inner.node for name in node.output}
            for name in sorted({name for node in inner.node for name in node.input} & small.keys() - own):
                inner.initializer.add().CopyFrom(small[name])
                inner.initializer[-1].name = name
    return outline
