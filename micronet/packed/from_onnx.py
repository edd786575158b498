"""Conversion of an ONNX model, as ``to_onnx`` exports it, into a packed program.

Dequantized integers stay integers, and integer thresholds replace floats before signs.
"""

import re
from collections.abc import Mapping, Sequence

import onnx

from micronet import registry
from micronet.errors import MicronetError, count, either
from micronet.packed.builder import Converter, ProgramBuilder, Unsupported, layer_name, line_of
from micronet.packed.convert_elementwise import ELEMENTWISE
from micronet.packed.convert_layers import LAYERS
from micronet.packed.convert_shapes import SHAPES
from micronet.packed.passes import fuse_gates, fuse_thresholds, move_forward
from micronet.packed.program import Program
from micronet.runtimes.onnxruntime import metadata

INSTEAD = f"run micronet export --target {either(registry.RUN_ANY)} instead"
CONVERTERS: dict[str, Converter] = {**LAYERS, **ELEMENTWISE, **SHAPES}
DATA_INPUTS = dict.fromkeys(
    ("Resize", "Reshape", "Slice", "Pad", "Split", "Squeeze", "Unsqueeze", "Expand"), 1
)  # the others are parameters
SHAPE_ONLY = "Reshape", "Flatten", "Squeeze", "Unsqueeze"


def pack_model(proto: onnx.ModelProto, runtime: str = "the packed runtime") -> Program:
    """Convert an ONNX model.

    Raises MicronetError that names every operator that packed programs do not have; ``runtime``: what it calls them by.
    """
    builder = ProgramBuilder(proto)
    check_inputs({name: builder.shapes.get(name, []) for name in builder.inputs}, runtime)
    nodes = _needed_nodes(builder)
    failed: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        if node.output[0] in builder.operations or node.output[0] in builder.aliases:
            continue
        try:
            if _changes_nothing(builder, node):
                builder.aliases[node.output[0]] = node.input[0]
                continue
            if node.op_type not in CONVERTERS:
                raise Unsupported(f"{node.op_type} is not supported")
            if node.op_type == "DequantizeLinear" or not builder.compute(node):  # stored integers stay integers
                CONVERTERS[node.op_type](builder, node)
        except Unsupported as error:
            failed.setdefault(str(error), []).append(node)
    if failed:
        raise MicronetError(_explain(failed, nodes, runtime))
    outputs = [builder.resolve(entry.name) for entry in proto.graph.output]
    builder.outputs = outputs
    fuse_gates(builder)
    move_forward(builder)
    fuse_thresholds(builder)
    return _build(builder, proto, runtime)


def check_inputs(shapes: Mapping[str, Sequence[int]], runtime: str = "the packed runtime") -> None:
    """Raise MicronetError unless a network takes one image of a fixed size; ``shapes``: its inputs, without batch."""
    shape = next(iter(shapes.values()), [])
    if len(shapes) != 1 or len(shape) != 3 or 0 in shape:
        given = " and ".join(f"{name} {tuple(each)}".lstrip() for name, each in shapes.items())
        cure = "export it with fixed sizes" if 0 in shape else INSTEAD
        raise MicronetError(
            f"{runtime} runs networks with one input of a fixed size (channels, height, width), but this one "
            f"takes {given}; {cure}"
        )


def _needed_nodes(builder: ProgramBuilder) -> list[onnx.NodeProto]:
    """Return the nodes from which the outputs are computed, but not those that only compute shapes."""
    needed = {entry.name for entry in builder.graph.output}
    found = []
    for node in reversed(builder.graph.node):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(node.input[: DATA_INPUTS.get(node.op_type)])
    return found[::-1]


def _changes_nothing(builder: ProgramBuilder, node: onnx.NodeProto) -> bool:
    """Return True for a reshape to the shape that its input has already, which is known."""
    given, made = (builder.shapes.get(name, []) for name in (node.input[0], node.output[0]))
    return node.op_type in SHAPE_ONLY and given == made and 0 not in given and bool(given)


def _explain(failed: dict[str, list[onnx.NodeProto]], nodes: list[onnx.NodeProto], runtime: str) -> str:
    """Return one line per reason, with all the layers of the network's ``nodes`` that it concerns."""
    bad = sum(map(len, failed.values()))
    makers = {name: node for node in nodes for name in node.output}
    lines = [
        f"  {reason}: {', '.join(dict.fromkeys(_layer(node, makers) for node in found))}."
        for reason, found in failed.items()
    ]
    total = count(len(nodes), "operator")
    return (
        f"{runtime} cannot run {bad} of the network's {total}:\n" + "\n".join(lines) + "\n"
        f"Nothing was computed or written; {INSTEAD}"
    )


def _layer(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    """Return the name of the layer that a node belongs to, and the line of the user's code, if it is known.

    For a function call in the forward whose line is not, the layer before it.
    """
    name, line = node.name or node.output[0], line_of(node)
    if line or not _is_call(node):
        return f"{layer_name(node)}{line}"
    before = makers.get(node.input[0]) if node.input else None
    while before is not None and (before.op_type not in LAYERS or _is_call(before)):
        before = makers.get(before.input[0]) if before.input else None
    return f"{name} (a function call{f' after {_layer(before, makers)}' if before is not None else ''})"


def _is_call(node: onnx.NodeProto) -> bool:
    """Return True for a function call in the forward, which has the name of its operator."""
    return re.fullmatch(rf"{node.op_type}([._]\d+)?", node.name or node.output[0]) is not None


def _build(builder: ProgramBuilder, proto: onnx.ModelProto, runtime: str) -> Program:
    """Number the operations that the outputs depend on."""
    needed = set(builder.outputs)
    for name, (_, inputs) in reversed(builder.operations.items()):
        needed.update(inputs if name in needed else ())
    names = [name for name in builder.operations if name in needed]
    number = {builder.image: 0} | {name: index for index, name in enumerate(names, 1)}
    if stored := sorted(needed - {*number}):
        raise MicronetError(f"{runtime} does not run networks that return constants ({', '.join(stored)}); {INSTEAD}")
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
