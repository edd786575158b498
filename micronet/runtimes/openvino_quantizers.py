"""Move the quantizers of a network for OpenVINO to the linear layers that read them.

ONNX files round what a layer gives, since ONNX Runtime needs that; operators that only move values follow, then layers.
OpenVINO 2026.4 moves a dequantization through such operators, and does so wrongly where axis 1 is not the channels': it
crashes (a shifted window), refuses to compile or returns other numbers (a class token), or reads beyond a tensor (the
mean of tokens). Its layers can return floats, so a linear layer that reads integers rounds right before it instead,
which gives it the same ones, and what computes in floats reads floats. Between convolutions, nothing changes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOVES = frozenset({
    "Broadcast", "Concat", "Convert", "Gather", "Identity", "Pad", "Reshape", "Roll", "Slice", "Split", "Squeeze",
    "StridedSlice", "Tile", "Transpose", "Unsqueeze", "VariadicSplit",
})  # fmt: skip
CONVOLUTIONS = frozenset({
    "Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData",
})  # fmt: skip
IMAGE_AXES = 4
MAPS_READERS = CONVOLUTIONS | {"AvgPool", "MaxPool"}


def move_quantizers(operators: Any, nodes: list[Any]) -> None:
    """Move the quantizers of a network, in place; ``nodes``: its operators, in their order."""
    maps = {len(node.output(0).get_partial_shape()) for node in nodes if node.get_type_name() in CONVOLUTIONS}
    for node in nodes:
        kind = node.get_type_name()
        if kind == "FakeQuantize" and (end := _dequantized(node)) is not None:
            for reader in sorted(end.get_target_inputs(), key=lambda each: each.get_node().get_friendly_name()):
                if not _stays(end, reader, maps):
                    _sink(operators, node, node.input_value(0), reader)
            _keep_behind(operators, node, end)
        elif kind == "Multiply":
            readers = node.output(0).get_target_inputs()  # a bias is reshaped
            moves = [each for each in readers if each.get_node().get_type_name() in MOVES - {"Reshape"}]
            if moves and (values := _stored(node.output(0))) is not None:
                stored = operators.constant(values, np.float32).output(0)
                for reader in moves:
                    reader.replace_source_output(stored)


def _keep_behind(operators: Any, rounding: Any, end: Any) -> None:
    """Keep OpenVINO from moving a rounding before what concatenates tokens or windows, by an axis of one around it."""
    node = rounding.input_value(0).get_node()
    while node.get_type_name() in MOVES - {"Concat", "Unsqueeze"}:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Concat" and MAPS_READERS.isdisjoint(_kinds_behind(node)):
        readers, axis = end.get_target_inputs(), operators.constant([0], np.int64)
        rounding.input(0).replace_source_output(operators.unsqueeze(rounding.input_value(0), axis).output(0))
        for reader in readers:
            reader.replace_source_output(operators.squeeze(end, axis).output(0))


def _stored(value: Any) -> NDArray[Any] | None:
    """Return the numbers of a tensor that is stored, or dequantized from stored integers; None for any other."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data)
    given = [_stored(each) for each in node.input_values()] if kind in ("Convert", "Subtract", "Multiply") else [None]
    if any(each is None for each in given):
        return None
    first, *others = (np.asarray(each, np.float32) for each in given)
    return first if not others else first - others[0] if kind == "Subtract" else first * others[0]


def _dequantized(rounding: Any) -> Any | None:
    """Return the output of the Multiply that ends a quantizer as it is read from an ONNX file, or None."""
    value = rounding.output(0)
    while len(readers := list(value.get_target_inputs())) == 1:
        node = readers[0].get_node()
        if node.get_type_name() not in ("Convert", "Subtract", "Multiply") or readers[0].get_index():
            return None
        value = node.output(0)
        if node.get_type_name() == "Multiply":
            return value
    return None


def _stays(value: Any, reader: Any, maps: set[int]) -> bool:
    """Return True if a reader of a dequantized tensor gets it as it is: of feature maps, or a layer in integers.

    ``maps``: how many axes feature maps have.
    """
    node, axes = reader.get_node(), len(value.get_partial_shape())
    kind = node.get_type_name()
    if kind in MOVES:
        return not MAPS_READERS.isdisjoint(_kinds_behind(node))
    if kind.startswith("Reduce"):
        return axes == IMAGE_AXES  # others are read beyond their end
    return axes in maps or kind in CONVOLUTIONS | {"MatMul", "Result"}


def _kinds_behind(node: Any) -> Iterator[str]:
    """Yield the kinds of the first operators behind a moving one that do more than move or round values."""
    for output in node.outputs():
        for each in output.get_target_inputs():
            kind, after = each.get_node().get_type_name(), each.get_node()
            if kind == "FakeQuantize" and (end := _dequantized(after)) is not None:
                after, kind = end.get_node(), "Identity"
            if kind in MOVES:
                yield from _kinds_behind(after)
            else:
                yield kind


def _sink(operators: Any, rounding: Any, value: Any, reader: Any) -> None:
    """Let a reader, or what reads its result, round for itself; ``value``: what it reads then, in floats."""
    node = reader.get_node()
    kind = node.get_type_name()
    if kind == "MatMul" and reader.get_source_output().get_node().get_type_name() == "FakeQuantize":
        pass  # two quantizers were concatenated: the layer reads floats
    elif kind == "MatMul":
        low, high = (rounding.input_value(index) for index in (1, 2))
        value = operators.fake_quantize(value, low, high, low, high, rounding.get_attributes()["levels"]).output(0)
    reader.replace_source_output(value)
    if kind in MOVES:
        for output in node.outputs():
            for each in output.get_target_inputs():
                _sink(operators, rounding, output, each)
