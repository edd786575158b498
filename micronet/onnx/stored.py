"""What ONNX files store: graphs, and tensors, whose bytes are counted before memory is reserved."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from micronet.core.parse import check_regular
from micronet.onnx.ops import DEQUANTIZE

MAX_WEIGHT_BYTES = 2**31 - 2**20  # what one protobuf message can hold beside the graph
PACKED_BITS = {  # types with several numbers in a byte; those of two bits are unknown to older releases of onnx
    getattr(TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(TensorProto, name)
}
MAX_UNPACKED = 64  # numbers, with all results in between, that one byte of packed weights may become
UNPACKING: dict[str, Callable[..., NDArray[Any]]] = {  # the operators that unpack weights
    "Cast": lambda x, to: x.astype(onnx.helper.tensor_dtype_to_np_dtype(to)),
    "Gather": lambda table, indices: table[indices],
    "Reshape": lambda x, shape: x.reshape(shape),
    "Slice": lambda x, start, stop: x[tuple(map(slice, start, stop))],
    "Add": lambda a, b: a + b.reshape(a.shape),
}


def content_key(values: NDArray[Any]) -> tuple[Any, ...]:
    """Return what only tensors of the same type, shape and content have in common."""
    return values.dtype, values.shape, hashlib.sha256(values.tobytes()).digest()


def node_lists(*roots: Any) -> Iterator[Any]:
    """Yield graphs or functions, and the graphs inside their nodes: all have nodes."""
    waiting: list[Any] = [*roots]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += (inner for node in graph.node for inner in inner_graphs(node))


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside a node, such as the branches of an If."""
    for attribute in node.attribute:
        yield from [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def stored_tensors(*roots: Any) -> Iterator[tuple[str, TensorProto]]:
    """Yield every stored tensor with its name: initializers, and those in attributes, such as a Constant's."""
    for graph in node_lists(*roots):
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


def load_external(proto: onnx.ModelProto, stored: list[TensorProto], folder: Path) -> None:
    """Read weights that are in other files below the folder, as many bytes of each as its tensor needs."""
    outside = [each for each in stored if each.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        size = byte_count(tensor)
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


def byte_count(tensor: TensorProto) -> int:
    """Return how many bytes a stored tensor's values take. Raise KeyError if its type is unknown."""
    whole = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    bits: int = math.prod(tensor.dims) * PACKED_BITS.get(tensor.data_type, 8 * whole)
    return -(-bits // 8)


def check_tensor(tensor: TensorProto) -> None:
    """Raise ValueError or KeyError unless a stored tensor's type is known and its bytes fill its shape."""
    size = byte_count(tensor)
    if min(tensor.dims, default=0) < 0 or size > MAX_WEIGHT_BYTES:
        raise ValueError(f"the shape {tuple(tensor.dims)} of {tensor.name} is invalid")
    if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
        raise ValueError(f"{tensor.name} has {len(tensor.raw_data):,} bytes, expected {size:,}")


def float_values(tensor: TensorProto) -> Any:
    """Return a stored tensor's values if they are floats, in a type that numpy knows, otherwise None."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
        return numpy_helper.to_array(tensor)
    small = tensor.data_type not in (TensorProto.STRING, *PACKED_BITS) and kind.kind not in "biucOSU"
    return numpy_helper.to_array(tensor).astype(np.float32) if small else None


def unpack_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with weights that ``low_bits.pack_weights`` packed as 8-bit integers again; others as they are."""
    unpacked = _unpacked(proto.graph)
    if not unpacked:
        return proto
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    graph = plain.graph
    packed = {name for node in graph.node if node.output[0] in unpacked for name in node.input}
    nodes = [node for node in proto.graph.node if node.output[0] not in unpacked]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for each in node_lists(graph) for node in each.node for name in node.input}
    read.update(each.name for each in graph.output)
    tensors = [each for each in proto.graph.initializer if each.name in read or each.name not in packed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    graph.initializer.extend(numpy_helper.from_array(unpacked[name], name) for name in unpacked if name in read)
    return plain


def _unpacked(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """Return what the nodes compute that unpack weights; nothing if the file asks for more than packed weights do."""
    wanted, nodes = set[str](), list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if node.op_type == DEQUANTIZE:
            wanted.add(node.input[0])
        elif node.op_type in UNPACKING and wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    known = {each.name: numpy_helper.to_array(each) for each in graph.initializer if each.name in read}
    left = MAX_UNPACKED * sum(each.nbytes for each in known.values())
    found: dict[str, NDArray[Any]] = {}
    for node in reversed(nodes):
        given = [known[name] for name in node.input if name in known]
        options = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if len(given) < len(node.input) or not given:
            continue
        left -= given[-1].size * math.prod(given[0].shape[1:]) if node.op_type == "Gather" else given[0].size
        if left < 0:
            return {}
        try:
            found[node.output[0]] = known[node.output[0]] = UNPACKING[node.op_type](*given, **options)
        except (IndexError, KeyError, TypeError, ValueError):  # another use of the operator
            continue
    return found
