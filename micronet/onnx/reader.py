"""ONNX files, read within bounds: sizes are checked before memory is reserved, and values before anyone computes."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from micronet.core.parse import check_regular
from micronet.errors import FailedError, MicronetError, count, first_line
from micronet.models.spec import LARGEST_INPUT
from micronet.onnx.ops import DEQUANTIZE, QUANTIZE, RECURRENT, RESHAPES, WEIGHTED_OPS
from micronet.onnx.order import sort_nodes
from micronet.onnx.sizes import TooLargeError, check_computed, declare_outputs
from micronet.onnx.stored import check_tensor, float_values, load_external, node_lists, stored_tensors, unpack_weights

# Operators that multiply by weights or statistics, where infinity gives nothing but infinity and NaN. Others may read
# it: an attention mask holds -infinity, and exporters multiply by it to make one.
MULTIPLYING = WEIGHTED_OPS | RECURRENT | {
    "PRelu", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
    "RMSNormalization", QUANTIZE, DEQUANTIZE,
}  # fmt: skip
PASSING = RESHAPES | {"Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Expand", DEQUANTIZE}
SELECTING = {"Where", "IsNaN", "Equal"}  # they may read NaN, which marks what is missing
MISSING_DOMAIN = "ai.onnx.ml"  # whose operators may, too
VARIANCE = 4  # the input of a BatchNormalization


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        MicronetError: It is missing or damaged, or computes a tensor of more than 2 GiB.
        FailedError: It holds NaN, infinity in something that is multiplied, a negative variance or a scale that is not
            positive.
    """
    if not path.exists():
        raise MicronetError(f"{path} does not exist; create it with micronet export-onnx")
    try:
        check_regular(path)
        proto = onnx.load(path, load_external_data=False)
        stored = [tensor for _, tensor in stored_tensors(proto.graph, *proto.functions)]
        load_external(proto, stored, path.parent)
        if not proto.graph.node:
            raise ValueError("it contains no graph")
        for tensor in stored:
            check_tensor(tensor)
        for value in [*proto.graph.input, *proto.graph.output]:
            _check_declared(value)
        changed = [sort_nodes(each) for each in node_lists(proto.graph, *proto.functions)] + [declare_outputs(proto)]
        # Not of proto without need, which is too large if it took weights from a second file.
        onnx.checker.check_model(proto if any(changed) else path)
        check_computed(proto)
        proto = unpack_weights(proto)
        wrong = next(filter(None, map(_wrong_value, (proto.graph, *proto.functions))), None)
    except TooLargeError as error:
        raise MicronetError(f"{path} is too large: {error}") from error
    except Exception as error:  # protobuf and onnx raise several types; they all mean the same to the user
        raise MicronetError(f"{path} is not a complete ONNX model ({first_line(error)}); export it again") from error
    if wrong is not None:
        raise FailedError(f"{path} has {wrong}; export it again")
    return proto


def _check_declared(value: onnx.ValueInfoProto) -> None:
    """Raise ValueError or KeyError unless an input's or output's type is known and its shape possible."""
    sides = value.type.tensor_type.shape.dim
    for dim in sides:
        if dim.dim_value == -1:  # how some exporters write an unknown size
            dim.ClearField("dim_value")
    shape = [dim.dim_value for dim in sides]
    if min(shape, default=0) < 0 or math.prod(side or 1 for side in shape) > LARGEST_INPUT:
        raise ValueError(f"the shape {shape} of {value.name} is invalid")
    if value.type.tensor_type.elem_type:
        onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _wrong_value(part: onnx.GraphProto | onnx.FunctionProto) -> str | None:
    """Say which tensor that a graph or a function stores holds what no network computes with, or return None.

    That is NaN that is not only selected; infinity in what a MULTIPLYING operator reads; a negative variance; a
    negative scale, or one of zero to divide by.
    """
    nodes = [node for graph in node_lists(part) for node in graph.node]
    multiplied = _read_by(part, (node for node in nodes if node.op_type in MULTIPLYING))
    selected = _selected(part, nodes)
    divided: set[str] = set()
    positive: set[str] = set()
    for node in nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            positive.update(node.input[1:2])
            divided.update(node.input[1:2] if node.op_type == QUANTIZE else [])
        elif node.op_type == "BatchNormalization":
            positive.update(node.input[VARIANCE : VARIANCE + 1])
    for name, tensor in stored_tensors(part):
        values = float_values(tensor)
        if values is None:
            continue
        if name not in selected and (nans := int(np.isnan(values).sum())):
            return f"NaN in {name} ({nans:,} of {count(values.size, 'value')})"
        if name in multiplied and not np.isfinite(values).all():
            return f"infinity in {name}, which is multiplied"
        if name in positive and (values < 0).any():
            return f"a negative scale or variance in {name}"
        if name in divided and not values.all():
            return f"a scale of zero in {name}"
    for node in nodes:
        name = node.output[0] if node.output else node.name
        holds = any(math.isnan(value) for each in node.attribute for value in (each.f, *each.floats))
        if holds and node.domain != MISSING_DOMAIN and name not in selected:
            return f"NaN in an attribute of {name}"
    return None


def _selected(part: onnx.GraphProto | onnx.FunctionProto, nodes: list[onnx.NodeProto]) -> set[str]:
    """Return the names of tensors that SELECTING operators read, and nothing that computes."""
    selecting = [node for node in nodes if node.op_type in SELECTING or node.domain == MISSING_DOMAIN]
    apart = {id(node) for node in selecting}
    computing = (node for node in nodes if id(node) not in apart and node.op_type not in PASSING)
    outputs = [each if isinstance(each, str) else each.name for graph in node_lists(part) for each in graph.output]
    return _read_by(part, selecting) - _read_by(part, computing, outputs)


def _read_by(
    part: onnx.GraphProto | onnx.FunctionProto, readers: Iterable[onnx.NodeProto], names: Iterable[str] = ()
) -> set[str]:
    """Return the names given and those that the readers read, directly or through operators that only move."""
    found = {name for node in readers for name in node.input}.union(names)
    for graph in node_lists(part):
        for node in reversed(graph.node):
            if node.op_type in PASSING and found.intersection(node.output):
                found.update(node.input[:1])
    return found
