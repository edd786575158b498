"""Mutations of ONNX files: nodes, attributes, tensors, shapes, places of external data."""

import struct
from random import Random
from typing import Any

import numpy as np
import onnx

from tests.fuzz.mutate import DEEP, mutate_bytes

EXTERNAL = {
    "location": [
        "/etc/passwd", "../../x", "w.bin", "link.bin", "huge.bin", "pipe.bin", "/dev/zero", "images", "external.bin",
        "", "a/../../x", "./external.bin", "damaged.onnx",
    ],
    "offset": ["-1", "0", "64", "9" * 30, "x", "1e3", str(2**39)],
    "length": ["-1", "0", "64", "9" * 30, "x", str(2**39)],
    "checksum": ["x"],
}  # fmt: skip


def mutate_onnx(content: bytes, random: Random) -> bytes:
    """Mutate an ONNX file: its bytes, or a node, attribute, tensor or shape of its graph."""
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    proto = onnx.load_model_from_string(content)
    graph = proto.graph
    for _ in range(random.choice([1, 1, 2, 4])):
        node = random.choice(graph.node)
        match random.randrange(14):
            case 0:
                node.op_type = random.choice(
                    ["Conv", "Loop", "If", "ConstantOfShape", "Nope", "MatMul", "Reshape", "Gemm", "Range", "Expand"]
                )
            case 1 if node.input:
                node.input[random.randrange(len(node.input))] = random.choice(
                    ["", "nope", *node.output, graph.node[0].input[0]]
                )
            case 2 if node.attribute:
                attribute = random.choice(node.attribute)
                for index in range(len(attribute.ints)):
                    attribute.ints[index] = random.choice([0, -1, 2**31, 2**62, 3, 1])
                attribute.i, attribute.f = random.choice([0, -1, 2**40, 1]), random.choice([0.0, float("nan"), 1e38])
            case 3 if graph.initializer:
                tensor = random.choice(graph.initializer)
                if tensor.dims:
                    tensor.dims[random.randrange(len(tensor.dims))] = random.choice([0, -1, 1, 2**31, 2**60, 7])
            case 4 if graph.initializer:
                tensor = random.choice(graph.initializer)
                tensor.raw_data = random.choice([b"", tensor.raw_data[:-1], b"\xff" * len(tensor.raw_data), bytes(4)])
            case 5 if graph.initializer:
                random.choice(graph.initializer).data_type = random.choice([0, 1, 2, 7, 8, 10, 11, 14, 16, 99])
            case 6:
                shape = random.choice([*graph.input, *graph.output]).type.tensor_type.shape
                if shape.dim:
                    dim = random.choice(shape.dim)
                    dim.dim_value = random.choice([0, -1, 1, 3, 2**31, 2**62])
            case 7:
                del graph.node[random.randrange(len(graph.node))]
                if not graph.node:
                    return content[:10]
            case 8:
                random.choice([*graph.input, *graph.output]).type.tensor_type.elem_type = random.choice(
                    [0, 1, 7, 8, 9, 99]
                )
            case 9 if proto.metadata_props:
                entry = random.choice(proto.metadata_props)
                entry.value = random.choice(
                    [DEEP, "{}", "[]", "3", "{", entry.value[:-2], entry.value.replace("1", "-1")]
                )
            case 10 if graph.initializer:
                tensor = random.choice(graph.initializer)
                tensor.data_location = onnx.TensorProto.EXTERNAL
                del tensor.external_data[:]
                for key, values in EXTERNAL.items():
                    if key == "location" or random.random() < 0.4:
                        tensor.external_data.add(key=key, value=random.choice(values))
            case 11:
                for item in proto.opset_import:
                    item.version = random.choice([0, 1, 7, 13, 999, -1])
            case 12:
                _add_maker(graph, random)
            case 13 if graph.initializer:
                tensor = random.choice(graph.initializer)
                if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) >= 4:
                    value = random.choice([float("nan"), float("inf"), float("-inf"), -1.0, 3e38])
                    tensor.raw_data = struct.pack("<f", value) + tensor.raw_data[4:]
    return proto.SerializeToString()


def _add_maker(graph: Any, random: Random) -> None:
    """Put a node that makes many values out of few before the graph's last output."""
    sizes = [random.choice([1, 2**10, 2**20, 2**31, 2**62]) for _ in range(2)]
    kind = random.choice(["ConstantOfShape", "Expand", "Tile", "RandomNormal", "Pad", "Range", "Constant"])
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(sizes), "sizes"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "one_by_one"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, *sizes]), "pads"))
    for name, value in (("from", 0), ("to", sizes[0]), ("by", 1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    given = {
        "ConstantOfShape": ["sizes"], "Expand": ["one_by_one", "sizes"], "Tile": ["one_by_one", "sizes"],
        "Pad": ["one_by_one", "pads"], "Range": ["from", "to", "by"],
    }  # fmt: skip
    attributes: dict[str, Any] = {"shape": sizes} if kind == "RandomNormal" else {}
    if kind == "Constant":
        attributes = {"value_float": random.choice([float("nan"), float("inf"), 1.0])}
    last = graph.output[0].name
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == last:
                node.output[index] = "before"
    new = [
        onnx.helper.make_node(kind, given.get(kind, []), ["made"], **attributes),
        onnx.helper.make_node("Cast", ["made"], ["cast"], to=1),
        onnx.helper.make_node("ReduceMax", ["cast"], ["largest"], keepdims=0),
        onnx.helper.make_node("Add", ["before", "largest"], [last]),
    ]
    if random.random() < 0.3:
        branch = onnx.helper.make_graph(new[:3], "b", [], [onnx.helper.make_tensor_value_info("largest", 1, [])])
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
        new[:3] = [onnx.helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)]
        new[-1].input[1] = "chosen"
    graph.node.extend(new)
