"""Conversion of an ONNX model, as ``to_onnx`` exports it, into a packed program.

Dequantized integers stay integers, and integer thresholds replace floats before signs.
"""

import re

import onnx

from micronet.errors import MicronetError, count
from micronet.packed.builder import Converter, ProgramBuilder, Unsupported
from micronet.packed.convert_elementwise import ELEMENTWISE
from micronet.packed.convert_layers import LAYERS
from micronet.packed.convert_shapes import SHAPES
from micronet.packed.passes import fuse_gates, fuse_thresholds, move_forward
from micronet.packed.program import Program
from micronet.runtimes.onnxruntime import metadata

CONVERTERS: dict[str, Converter] = {**LAYERS, **ELEMENTWISE, **SHAPES}
DATA_INPUTS = {"Resize": 1, "Reshape": 1, "Slice": 1, "Pad": 1, "Split": 1, "Squeeze": 1}  # the others are parameters


def pack_model(proto: onnx.ModelProto) -> Program:
    """Convert an ONNX model. Raises MicronetError that names every operator the packed runtime cannot run."""
    builder = ProgramBuilder(proto)
    shape = builder.shapes.get(builder.image, [])
    if len(builder.inputs) != 1 or len(shape) != 3 or 0 in shape:
        given = " and ".join(f"{name} {tuple(builder.shapes.get(name, []))}" for name in builder.inputs)
        cure = "export it with fixed sizes" if 0 in shape else "use micronet export-onnx, which supports any inputs"
        raise MicronetError(
            "the packed runtime runs networks with one input of a fixed size (channels, height, width), but this one "
            f"takes {given}; {cure}"
        )
    nodes = _needed_nodes(builder)
    failed: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        if node.output[0] in builder.operations or node.output[0] in builder.aliases:
            continue
        try:
            if node.op_type not in CONVERTERS:
                raise Unsupported(f"{node.op_type} is not supported")
            CONVERTERS[node.op_type](builder, node)
        except Unsupported as error:
            failed.setdefault(str(error), []).append(node)
    if failed:
        raise MicronetError(_explain(failed, len(nodes)))
    outputs = [builder.resolve(entry.name) for entry in proto.graph.output]
    builder.outputs = outputs
    fuse_gates(builder)
    move_forward(builder)
    fuse_thresholds(builder)
    return _build(builder, proto)


def _needed_nodes(builder: ProgramBuilder) -> list[onnx.NodeProto]:
    """Return the nodes from which the outputs are computed, but not those that only compute shapes."""
    needed = {entry.name for entry in builder.graph.output}
    found = []
    for node in reversed(builder.graph.node):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(node.input[: DATA_INPUTS.get(node.op_type)])
    return found[::-1]


def _explain(failed: dict[str, list[onnx.NodeProto]], total: int) -> str:
    """Return one line per reason, with all the layers that it concerns."""
    bad = sum(map(len, failed.values()))
    lines = [f"  {reason}: {', '.join(map(_layer, nodes))}." for reason, nodes in failed.items()]
    return (
        f"the packed runtime cannot run {bad} of the network's {count(total, 'operator')}:\n" + "\n".join(lines) + "\n"
        "Nothing was computed or written; export the network with micronet export-onnx, which supports them"
    )


def _layer(node: onnx.NodeProto) -> str:
    """Return the name of the layer that a node belongs to, or say that it is a function call in the forward."""
    name = node.name or node.output[0]
    if re.fullmatch(rf"{node.op_type}([._]\d+)?", name):
        return f"{name} (a function call)"
    return re.sub(rf"\.{node.op_type}(\.\d+)?$", "", name)


def _build(builder: ProgramBuilder, proto: onnx.ModelProto) -> Program:
    """Number the operations that the outputs depend on."""
    needed = set(builder.outputs)
    for name, (_, inputs) in reversed(builder.operations.items()):
        needed.update(inputs if name in needed else ())
    names = [name for name in builder.operations if name in needed]
    number = {builder.image: 0} | {name: index for index, name in enumerate(names, 1)}
    operations = [builder.operations[name][0] for name in names]
    if not operations:
        raise MicronetError("the network returns its input as it is, so there is nothing to pack")
    for operation, name in zip(operations, names, strict=True):
        operation.inputs = [number[item] for item in builder.operations[name][1]]
    about = metadata(proto)
    stages = [record.get("stage") for record in about.get("history") or []]
    about = {key: about[key] for key in ("model", "data") if key in about} | {"stages": stages}
    outputs = [number[name] for name in builder.outputs]
    return Program(operations, builder.shapes[builder.image], about, None if outputs == [len(operations)] else outputs)
