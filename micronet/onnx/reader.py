"""ONNX files, read within bounds: sizes are checked before memory is reserved, and values before anyone computes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.inliner import inline_local_functions

from micronet.core.parse import check_regular
from micronet.errors import FailedError, MicronetError, count, first_line
from micronet.models.spec import LARGEST_INPUT
from micronet.onnx.ops import DEQUANTIZE, QUANTIZE, RECURRENT, RESHAPES, WEIGHTED_OPS

MAX_WEIGHT_BYTES = 2**31 - 2**20  # what one protobuf message can hold beside the graph
MAX_VALUE_BYTES = 2**31  # of one tensor that a network computes: as much as ONNX allows a stored one
PACKED_TYPES = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}  # several numbers in a byte
LARGEST_RANGE = 2**20  # numbers of a Range: inferring shapes keeps each of them
SHAPE_BYTES = 1024  # a stored tensor that says shapes is smaller
# Operators that multiply by what they read, where infinity gives nothing but infinity and NaN. Others may add
# -infinity, as attention masks do.
MULTIPLYING = WEIGHTED_OPS | RECURRENT | {
    "Mul", "Einsum", "PRelu", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
    "RMSNormalization", QUANTIZE, DEQUANTIZE,
}  # fmt: skip
PASSING = RESHAPES | {"Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", DEQUANTIZE}
VARIANCE = 4  # the input of a BatchNormalization


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        MicronetError: It is missing or damaged, or computes a tensor of more than MAX_VALUE_BYTES.
        FailedError: It holds NaN, infinity in something that is multiplied, a negative variance or a scale that is not
            positive.
    """
    if not path.exists():
        raise MicronetError(f"{path} does not exist; create it with micronet export-onnx")
    try:
        check_regular(path)
        proto = onnx.load(path, load_external_data=False)
        stored = [tensor for _, tensor in _stored(proto)]
        _load_external(proto, stored, path.parent)
        if not proto.graph.node:
            raise ValueError("it contains no graph")
        for tensor in stored:
            _check_tensor(tensor)
        for value in [*proto.graph.input, *proto.graph.output]:
            _check_declared(value)
        onnx.checker.check_model(path)  # not proto, which is too large if it took weights from a second file
        _check_computed(proto)
        wrong = _wrong_value(proto)
    except Exception as error:  # protobuf and onnx raise several types; they all mean the same to the user
        raise MicronetError(f"{path} is not a complete ONNX model ({first_line(error)}); export it again") from error
    if wrong is not None:
        raise FailedError(f"{path} has {wrong}; export it again")
    return proto


def _node_lists(proto: onnx.ModelProto) -> Iterator[Any]:
    """Yield a model's graph, its functions, and the graphs inside their nodes: all have nodes."""
    waiting: list[Any] = [proto.graph, *proto.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for attribute in (each for node in graph.node for each in node.attribute):
            waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _stored(proto: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield every stored tensor with its name: initializers, and those in attributes, such as a Constant's."""
    for graph in _node_lists(proto):
        parts = [*getattr(graph, "sparse_initializer", [])]
        for tensor in getattr(graph, "initializer", []):
            yield tensor.name, tensor
        for node in graph.node:
            name = node.output[0] if node.output else node.name
            for attribute in node.attribute:
                for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
                    yield name, tensor
                parts += [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
        for sparse in parts:
            yield sparse.values.name, sparse.values


def _load_external(proto: onnx.ModelProto, stored: list[TensorProto], folder: Path) -> None:
    """Read weights that are in other files below the folder, as many bytes of each as its tensor needs."""
    outside = [each for each in stored if each.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        size = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if int(entries.get("length", size)) != size or size > MAX_WEIGHT_BYTES:
            raise ValueError(
                f"{tensor.name} has {entries.get('length')} bytes in {entries.get('location')}, expected {size:,}"
            )
        check_regular(folder / entries.get("location", ""))
        if "length" not in entries:
            tensor.external_data.add(key="length", value=str(size))
    if outside:
        onnx.external_data_helper.load_external_data_for_model(proto, str(folder))


def _check_tensor(tensor: TensorProto) -> None:
    """Raise ValueError or KeyError unless a stored tensor's type is known and its bytes fill its shape."""
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    size = math.prod(tensor.dims)
    packs = tensor.data_type in PACKED_TYPES
    if min(tensor.dims, default=0) < 0 or size * itemsize > MAX_WEIGHT_BYTES * (8 if packs else 1):
        raise ValueError(f"the shape {tuple(tensor.dims)} of {tensor.name} is invalid")
    if tensor.HasField("raw_data") and not packs and len(tensor.raw_data) != size * itemsize:
        raise ValueError(f"{tensor.name} has {len(tensor.raw_data):,} bytes, expected {size * itemsize:,}")


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


def _check_computed(proto: onnx.ModelProto) -> None:
    """Raise ValueError if a tensor that the network computes would take more than MAX_VALUE_BYTES.

    A few bytes can ask for any number of values (ConstantOfShape, Pad, Resize, RandomNormal, …), so it is the inferred
    shapes that count, not the operators. Shapes that depend on an input's values are unknown.
    """
    outline = _outline(proto)
    sized = onnx.shape_inference.infer_shapes(inline_local_functions(outline) if proto.functions else outline)
    _check_sizes(sized)
    _hide_ranges(sized)
    _check_sizes(onnx.shape_inference.infer_shapes(sized, data_prop=True))


def _check_sizes(proto: onnx.ModelProto) -> None:
    for graph in _node_lists(proto):
        ranges = {node.output[0] for node in graph.node if node.op_type == "Range"}
        for value in (*graph.value_info, *graph.output):
            if not value.type.tensor_type.elem_type:
                continue
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            known = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
            largest = LARGEST_RANGE if value.name in ranges else MAX_VALUE_BYTES // kind.itemsize
            if math.prod(known) > largest:
                raise ValueError(f"{value.name} has {math.prod(known):,} values")


def _hide_ranges(proto: onnx.ModelProto) -> None:
    """Make the numbers of Range nodes whose length is unknown depend on an input, in place.

    Otherwise ONNX's data propagation would compute the length, and keep every number.
    """
    for graph in _node_lists(proto):
        values = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
        for node in graph.node:
            if node.op_type == "Range" and not any(dim.HasField("dim_value") for dim in values.get(node.output[0], [])):
                del node.input[:]
                node.input.extend(["micronet:unknown"] * 3)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("micronet:unknown", TensorProto.INT64, []))


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
    small = {name: tensor for name, tensor in _stored(proto) if tensor.ByteSize() <= SHAPE_BYTES}
    for tensor in graph.initializer:
        kept = small.get(tensor.name, TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
        outline.graph.initializer.append(kept)
    for inner in (each for each in _node_lists(outline) if isinstance(each, onnx.GraphProto)):
        own = {tensor.name for tensor in inner.initializer} | {value.name for value in inner.input}
        own |= {name for node in inner.node for name in node.output}
        for name in sorted({name for node in inner.node for name in node.input} & small.keys() - own):
            inner.initializer.add().CopyFrom(small[name])
            inner.initializer[-1].name = name
    return outline


def _wrong_value(proto: onnx.ModelProto) -> str | None:
    """Say which stored tensor holds something that no network computes with, or return None.

    That is NaN anywhere; infinity in what a MULTIPLYING operator reads; a negative variance; a negative scale, or one
    of zero to divide by.
    """
    multiplied = _multiplied(proto)
    divided: set[str] = set()
    positive: set[str] = set()
    for node in (node for graph in _node_lists(proto) for node in graph.node):
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            positive.update(node.input[1:2])
            divided.update(node.input[1:2] if node.op_type == QUANTIZE else [])
        elif node.op_type == "BatchNormalization":
            positive.update(node.input[VARIANCE : VARIANCE + 1])
    for name, tensor in _stored(proto):
        values = _floats(tensor)
        if values is None:
            continue
        if nans := int(np.isnan(values).sum()):
            return f"NaN in {name} ({nans:,} of {count(values.size, 'value')})"
        if name in multiplied and not np.isfinite(values).all():
            return f"infinity in {name}, which is multiplied"
        if name in positive and (values < 0).any():
            return f"a negative scale or variance in {name}"
        if name in divided and not values.all():
            return f"a scale of zero in {name}"
    for node in (node for graph in _node_lists(proto) for node in graph.node):
        if any(math.isnan(value) for each in node.attribute for value in (each.f, *each.floats)):
            return f"NaN in an attribute of {node.output[0] if node.output else node.name}"
    return None


def _multiplied(proto: onnx.ModelProto) -> set[str]:
    """Return the names of tensors that MULTIPLYING operators read, directly or through operators that only move."""
    found: set[str] = set()
    for graph in _node_lists(proto):
        for node in reversed(graph.node):
            if node.op_type in MULTIPLYING:
                found.update(node.input)
            elif node.op_type in PASSING and found.intersection(node.output):
                found.update(node.input[:1])
    return found


def _floats(tensor: TensorProto) -> Any:
    """Return a stored tensor's values if they are floats, in a type that numpy knows, otherwise None."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
        return numpy_helper.to_array(tensor)
    small = tensor.data_type not in (TensorProto.STRING, *PACKED_TYPES) and kind.kind not in "biucOSU"
    return numpy_helper.to_array(tensor).astype(np.float32) if small else None
