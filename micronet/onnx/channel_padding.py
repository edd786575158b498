"""Channels of zeros beside those of depthwise convolutions, so that ONNX Runtime's int8 kernel computes 16 at a time.

It computes the channels that are left over one by one: 24 take twice as long as 32 (measured, ONNX Runtime 1.32, x86).
The convolutions before a depthwise one write the zeros, those behind read them with weights of 0, and every operator
between them computes each channel alone. So no other value changes. Other readers get a slice of the real channels.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from micronet.onnx.graph_view import array, producer, store, stored
from micronet.onnx.moves import ADDED
from micronet.onnx.ops import CLIP_OPS, DEQUANTIZE, POOLS, QUANTIZE, SMOOTH

WIDTH = 16  # channels that the kernel computes at a time
# Of a channel, for the zeros and for each slice: 1000 take 7 microseconds if computed alone; a slice takes 5 and more.
FEWEST_PRODUCTS = 1000
ONE_BY_ONE = {  # operators that compute every channel alone
    *CLIP_OPS, *POOLS, *SMOOTH, QUANTIZE, DEQUANTIZE, "Add", "Mul", "MaxPool", "LeakyRelu",
}  # fmt: skip
WEIGHT, BIAS = 1, 2  # inputs of a convolution
REAL = "micronet.channels"  # metadata of a padded convolution: the real sizes of its weight, and its groups


@dataclass
class _Region:
    """The tensors that get the same zeros.

    Attributes:
        channels: The real ones.
        values: The tensors.
        writers: The convolutions that compute them.
        readers: The convolutions that mix their channels.
        slices: Inputs of other operators, which get the real channels.
    """

    channels: int
    values: dict[ir.Value, None] = field(default_factory=dict)
    writers: dict[ir.Node, None] = field(default_factory=dict)
    readers: dict[ir.Node, None] = field(default_factory=dict)
    slices: list[tuple[ir.Node, int]] = field(default_factory=list)

    def gather(self, start: ir.Value) -> bool:
        """Collect all that is connected to a tensor; return False if it cannot be padded."""
        waiting = [start]
        while waiting:
            value = waiting.pop()
            if value in self.values:
                continue
            self.values[value] = None
            writer = value.producer()
            sources = [] if writer is not None and _mixes(writer) else self._sources(writer)
            if writer is None or sources is None or value.is_graph_output():
                return False
            waiting += sources
            if writer.op_type == "Conv":
                self.writers[writer] = None
            for reader, index in value.uses():
                if _mixes(reader) and index == 0:
                    self.readers[reader] = None
                elif value in (self._sources(reader) or ()):
                    waiting += reader.outputs
                else:
                    self.slices.append((reader, index))
        return all(map(_has_stored_integers, (*self.writers, *self.readers)))

    def _sources(self, node: ir.Node | None) -> list[ir.Value] | None:
        """Return the tensors that an operator reads channel by channel, or None if it does anything else."""
        if node is None or len(node.outputs) > 1:
            return None
        if _is_depthwise(node):
            return [value for value in node.inputs[:1] if value is not None]
        sources = [value for value in node.inputs if value is not None and not _is_number(value)]
        if node.op_type not in ONE_BY_ONE or any(value.const_value is not None for value in sources):
            return None
        return None if len(sources) > 1 and any(_size(value) != self.channels for value in sources) else sources

    def saves_time(self) -> bool:
        """Return True if what the depthwise convolutions save is worth the slices; unknown sizes count as large."""
        products = 0.0
        for node in filter(_is_depthwise, self.writers):
            sizes: tuple[Any, ...] = tuple(node.outputs[0].shape or ())[2:]
            known = bool(sizes) and all(isinstance(size, int) for size in sizes)
            products += math.prod((*_weight(node).shape.numpy()[2:], *sizes)) if known else math.inf
        return products >= FEWEST_PRODUCTS * (1 + len({node.inputs[index] for node, index in self.slices}))


def pad_depthwise(graph: ir.Graph) -> None:
    """Pad the channels of depthwise convolutions in integers, in place, where it saves time.

    Every DequantizeLinear of stored integers must have inputs of its own (see ``unshare_initializers``).
    """
    for node in list(graph):
        channels = node.attributes.get_int("group", 1)
        if _is_depthwise(node) and channels % WIDTH and node.inputs[0] is not None:
            region = _Region(channels)
            if region.gather(node.inputs[0]) and region.saves_time():
                _pad(graph, region)


def with_padded_channels(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return an int8 model with padded depthwise convolutions; see ``pad_depthwise``."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    pad_depthwise(model.graph)
    padded = ir.to_proto(model)
    del padded.graph.value_info[:]  # readers infer the shapes themselves
    return padded


def count_padded(proto: onnx.ModelProto) -> int:
    """Return how many depthwise convolutions of a model were padded."""
    about = ({entry.key: entry.value for entry in node.metadata_props} for node in proto.graph.node)
    return sum(REAL in each and each[REAL].split()[-1:] != ["1"] for each in about)


def _pad(graph: ir.Graph, region: _Region) -> None:
    more = -region.channels % WIDTH
    for node in {**region.writers, **region.readers}:
        outputs, inputs = _weight(node).shape.numpy()[:2]
        node.metadata_props.setdefault(REAL, f"{outputs} {inputs} {node.attributes.get_int('group', 1)}")
    for node in region.writers:
        if _is_depthwise(node):
            node.attributes["group"] = ir.AttrInt64("group", region.channels + more)
        for source in (producer(node, index) for index in range(WEIGHT, len(node.inputs))):
            assert source is not None  # they have stored integers
            for index, value in enumerate(source.inputs):
                _widen(value, 0, more, "edge" if index == 1 else "constant")  # scales of 0 would be invalid
    for node in region.readers:
        source = producer(node, WEIGHT)
        assert source is not None
        _widen(source.inputs[0], 1, more, "constant")
    for value in region.values:
        if value.shape is not None:
            value.shape = ir.Shape([*value.shape[:1], region.channels + more, *value.shape[2:]])
    _slice(graph, region)


def _widen(value: ir.Value | None, axis: int, more: int, mode: Any) -> None:
    """Add ``more`` entries to an axis of a stored tensor, unless it is a single number."""
    assert value is not None and value.const_value is not None
    values = value.const_value.numpy()
    if values.ndim:
        widths = [(0, more if index == axis else 0) for index in range(values.ndim)]
        value.const_value = ir.tensor(np.pad(values, widths, mode=mode), name=value.name)
        value.shape = ir.Shape(value.const_value.shape.numpy())


def _slice(graph: ir.Graph, region: _Region) -> None:
    """Give the other readers the real channels."""
    cut: dict[ir.Value, ir.Value] = {}
    for reader, index in region.slices:
        value = reader.inputs[index]
        assert value is not None
        if value not in cut:
            ends = {"starts": 0, "ends": region.channels, "axes": 1}
            given = [store(graph, f"{value.name}.{name}", [number]) for name, number in ends.items()]
            node = ir.node("Slice", [value, *given], name=f"{value.name}.real", metadata_props={ADDED: ""})
            cut[value] = result = node.outputs[0]
            result.name, result.type = f"{value.name}.real", value.type
            if value.shape is not None:
                result.shape = ir.Shape([*value.shape[:1], region.channels, *value.shape[2:]])
            writer = value.producer()
            assert writer is not None
            graph.insert_after(writer, node)
        reader.replace_input_with(index, cut[value])


def _weight(node: ir.Node) -> ir.TensorProtocol:
    """Return the stored integers of a convolution's weight."""
    source = producer(node, WEIGHT)
    tensor = None if source is None else stored(source)
    assert tensor is not None
    return tensor


def _is_depthwise(node: ir.Node) -> bool:
    """Return True for a convolution of one filter per channel whose weight is stored as integers."""
    groups = node.attributes.get_int("group", 1)
    if node.op_type != "Conv" or groups == 1 or not _has_stored_integers(node):
        return False
    return list(_weight(node).shape.numpy()[:2]) == [groups, 1]


def _mixes(node: ir.Node) -> bool:
    return node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1


def _has_stored_integers(node: ir.Node) -> bool:
    """Return True if a convolution's weight and bias are stored integers with a scale for each output or for all."""
    for index in range(WEIGHT, len(node.inputs)):
        source = producer(node, index)
        if source is None or source.op_type != DEQUANTIZE or len(source.outputs[0].uses()) > 1:
            return False
        if any(value is None or value.const_value is None for value in source.inputs):
            return False
        scale, axis = stored(source, 1), source.attributes.get_int("axis", 1)
        zero_point = array(source, 2) if len(source.inputs) > 2 else None
        if zero_point is not None and zero_point.any():  # integers of 0 would not be zeros
            return False
        if (scale is not None and scale.size > 1 and axis != 0) or source.attributes.get_int("block_size", 0) != 0:
            return False
    return True


def _is_number(value: ir.Value) -> bool:
    """Return True for a stored tensor of one value, also if it is dequantized."""
    node = value.producer()
    tensor = stored(node) if node is not None and node.op_type == DEQUANTIZE else value.const_value
    return tensor is not None and tensor.size == 1


def _size(value: ir.Value) -> int | None:
    """Return the size of a tensor's axis of channels, or None if it is unknown."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
    return size if isinstance(size, int) else None


def restore_channels(proto: onnx.ModelProto) -> None:
    """Remove the channels of zeros from a model whose weights are float, in place."""
    graph = proto.graph
    same, real = dict[str, str](), dict[str, tuple[slice, ...]]()
    for node in list(graph.node):
        about = {entry.key: entry.value for entry in node.metadata_props}
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Slice" and ADDED in about:
            same[node.output[0]] = node.input[0]
            graph.node.remove(node)
        elif REAL in about:
            outputs, inputs, groups = map(int, about[REAL].split())
            real[node.input[WEIGHT]] = slice(outputs), slice(inputs)
            real |= {name: (slice(outputs),) for name in node.input[BIAS:]}
            for attribute in (each for each in node.attribute if each.name == "group"):
                attribute.i = groups
    for tensor in graph.initializer:
        if tensor.name in real:
            values = onnx.numpy_helper.to_array(tensor)[real[tensor.name]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
