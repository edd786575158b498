"""What ``inspect`` tells of an ONNX file, from anywhere: its inputs, outputs, operators, layers and their bits."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from micronet.errors import MicronetError
from micronet.onnx.graph_view import GraphView, WeightedNode, layer_name, stored
from micronet.onnx.metadata import METADATA_KEY, metadata
from micronet.onnx.ops import INTEGER_LAYERS, RECURRENT
from micronet.onnx.reader import read_onnx
from micronet.onnx.stored import byte_count, node_lists, stored_tensors
from micronet.runtimes.onnx_cost import stored_parameters
from micronet.stages.origin import origin

LONGEST = 200  # characters of other tools' metadata
# Layers whose weight is not behind a DequantizeLinear -> the input that holds it.
WEIGHT_INPUT = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
    **dict.fromkeys(INTEGER_LAYERS - {"QLinearConv", "QLinearMatMul", "QGemm"} | RECURRENT, 1),
}
DIGITS = ".digits_"  # in the names of packed weights
WEIGHTS_ALONE = ("MatMulNBits",)  # integer operators of float activations
_FLOATS = {"FLOAT": "float32", "DOUBLE": "float64"}


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Return what an ONNX file holds, in JSON values. Raises MicronetError or FailedError as ``read_onnx`` does."""
    proto = read_onnx(path)  # in which weights of few bits are unpacked
    file = onnx.load(path, load_external_data=False)
    graphs = list(node_lists(file.graph, *file.functions))
    stores = {tensor.name for tensor in file.graph.initializer}  # old files also list these as inputs
    tensors = [tensor for _, tensor in stored_tensors(file.graph, *file.functions)]
    outside = {each.value for tensor in tensors for each in tensor.external_data if each.key == "location"}
    layers = layer_rows(proto, _packed_bytes(file))
    about = metadata(proto)
    return {
        "file": str(path),
        "kind": "onnx",
        "size_bytes": path.stat().st_size + sum((path.parent / name).stat().st_size for name in outside),
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "ir_version": proto.ir_version,
        "opsets": {each.domain or "ai.onnx": each.version for each in proto.opset_import},
        "inputs": [_value(each) for each in file.graph.input if each.name not in stores],
        "outputs": [_value(each) for each in proto.graph.output],
        "operators": dict(Counter(node.op_type for graph in graphs for node in graph.node).most_common()),
        "params": sum(map(stored_parameters, node_lists(proto.graph))),
        "layers": layers,
        "integer_layers": sum(layer["integer"] for layer in layers),
        "metadata": origin(about),
        "other_metadata": {
            each.key: each.value[:LONGEST] for each in proto.metadata_props if each.key != METADATA_KEY or not about
        },
    }


def _packed_bytes(file: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of each weight that ``low_bits.pack_weights`` packed, by its name."""
    found: Counter[str] = Counter()
    for tensor in file.graph.initializer:
        weight, digits, _ = tensor.name.rpartition(DIGITS)
        found[weight] += byte_count(tensor) if digits else 0
    return +found


def _value(info: onnx.ValueInfoProto) -> dict[str, Any]:
    """Return the name, the type and the shape of an input or output; None in place of a shape or size not known."""
    kind = info.type.WhichOneof("value") or "unknown"
    tensor = info.type.tensor_type
    if kind != "tensor_type":
        return {"name": info.name, "dtype": kind.removesuffix("_type"), "shape": None}
    sides = [side.dim_value or side.dim_param or None for side in tensor.shape.dim]
    return {"name": info.name, "dtype": _name(tensor.elem_type), "shape": sides if tensor.HasField("shape") else None}


def _name(code: int) -> str:
    """Return the name of a type of numbers: ``float32``, ``int8``."""
    names: dict[int, str] = {number: name for name, number in onnx.TensorProto.DataType.items()}
    name = names.get(code, "unknown")
    return _FLOATS.get(name, name.lower())


def layer_rows(proto: onnx.ModelProto, packed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a row for each layer with a stored weight, in the order of the file; none of those in branches and loops.

    ``weight`` and ``input`` are the types in which they are stored and passed; ``bits`` those of the weight; a layer is
    an ``integer`` one if both are integers, so that a runtime can compute it in integers.

    Args:
        proto: The model, with unpacked weights.
        packed: The bytes of weights that are packed in the file, by their name.
    """
    try:
        view = GraphView(proto)
    except MicronetError:  # whatever else the file says of itself stands without them
        return []
    weighted = {layer.node: layer for layer in view.layers}
    rows = []
    for node in view.nodes:
        if (layer := weighted.get(node)) is not None:
            scales = None if layer.weight_qdq is None else layer.weight_qdq.scale
            rows.append(_row(node, layer.weight, _input_type(layer), scales, integer=layer.quantized))
        elif node.op_type in WEIGHT_INPUT and (weight := stored(node, WEIGHT_INPUT[node.op_type])) is not None:
            integer = node.op_type in INTEGER_LAYERS and node.op_type not in WEIGHTS_ALONE
            rows.append(_row(node, weight, "uint8" if integer else "float32", None, integer=integer))
            if bits := node.attributes.get_int("bits", 0):  # MatMulNBits keeps several numbers in a byte
                rows[-1] |= {"bits": bits, "weight": f"uint{bits}"}
    for row in rows:
        if size := packed.get(row.pop("tensor")):
            row |= {
                "size_bytes": size,
                "bits": round(8 * size / row["params"], 2),
                "weight": f"{row['weight']}, packed",
            }
    return rows


def _row(node: Any, weight: Any, given: str, scales: Any, *, integer: bool) -> dict[str, Any]:
    shape = [int(side) for side in weight.shape.numpy()]
    spread = "" if scales is None else " per channel" if scales.size > 1 else " per tensor"
    return {
        "name": layer_name(node),
        "operator": node.op_type,
        "shape": "x".join(map(str, shape)),
        "params": math.prod(shape),
        "size_bytes": weight.nbytes,
        "bits": weight.dtype.bitwidth,
        "weight": f"{_name(weight.dtype.value)}{spread}",
        "input": given,
        "integer": integer,
        "tensor": weight.name,
    }


def _input_type(layer: WeightedNode) -> str:
    return _name(layer.input_qdq.dtype.value) if layer.input_qdq is not None else "float"
