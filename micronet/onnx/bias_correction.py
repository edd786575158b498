"""Bias correction of quantized ONNX networks: each layer's mean output becomes that of the float network.

Nagel et al. 2019, arXiv:1906.04721, section 4.2, with calibration inputs instead of an assumed distribution. Each
correction changes what later layers read, so the quantized network runs with the corrections in place: on the way
through it, the output of every layer is shifted until its mean is that of the float network's on the same inputs. The
correction is the mean of these shifts, as in ``micronet.quantization.recovery``.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from micronet.core.progress import Progress
from micronet.onnx.feeds import Feed
from micronet.onnx.insertion import BIAS_MAX
from micronet.onnx.ops import DEQUANTIZE
from micronet.onnx.sessions import session_for

CORRECTED = ("Conv", "Gemm")  # both have their channels on axis 1 of the output
AXES_ARE_INPUTS = 18  # the first opset in which those of ReduceMean are
NEW = "micronet.bias_correction"  # begins the names of what is only there while the shifts are sought


def give_biases(folded: onnx.ModelProto) -> None:
    """Give every convolution and Gemm of a float model a bias, in place, so that all can be corrected."""
    stored = {tensor.name: tensor for tensor in folded.graph.initializer}
    for number, node in enumerate(folded.graph.node):
        weight = stored.get(node.input[1]) if node.op_type in CORRECTED else None
        if weight is None or (len(node.input) > 2 and node.input[2]):
            continue
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        outputs = weight.dims[0 if node.op_type == "Conv" or transposed else 1]
        bias = numpy_helper.from_array(np.zeros(outputs, np.float32), f"{NEW}.{number}")
        folded.graph.initializer.append(bias)
        node.input[:] = [*node.input[:2], bias.name]


def correct_biases(folded: onnx.ModelProto, int8: onnx.ModelProto, feeds: Sequence[Feed], progress: Progress) -> int:
    """Restore the mean output of every integer layer that has a bias, in place.

    Args:
        folded: The float model, from ``prepare``.
        int8: The same model from ``quantize_onnx``.
        feeds: The calibration inputs.
        progress: Where to report progress.

    Returns:
        The number of layers corrected.
    """
    biases = _Biases(int8)
    known = {node.name for node in folded.graph.node}
    layers = [node.name for node in biases.layers if node.name in known]
    if not layers:
        return 0
    means = session_for(*_with_means(folded, layers))
    shifting = session_for(*_with_shifts(int8, layers, [biases.step(name) for name in layers]))
    sums: list[NDArray[Any]] = [np.zeros(1)] * len(layers)
    for done, feed in enumerate(feeds):
        targets = {f"{NEW}.target.{index}": target for index, target in enumerate(means(feed))}
        rows = len(next(iter(feed.values())))
        sums = [total + rows * shift.reshape(-1) for total, shift in zip(sums, shifting(feed | targets), strict=True)]
        progress.step("correcting biases", done + 1, len(feeds))
    samples = sum(len(next(iter(feed.values()))) for feed in feeds)
    for name, total in zip(layers, sums, strict=True):
        biases.add(name, total / samples)
    return len(layers)


class _Biases:
    """The biases of a quantized model's layers, by the name of the layer."""

    def __init__(self, int8: onnx.ModelProto) -> None:
        self._stored = {tensor.name: tensor for tensor in int8.graph.initializer}
        self._dequantized = {node.output[0]: node for node in int8.graph.node if node.op_type == DEQUANTIZE}
        self._readers = Counter(name for node in int8.graph.node for name in node.input)
        self.layers = [node for node in int8.graph.node if self._has_own_bias(node)]
        self._names = {node.name: node.input[2] for node in self.layers}

    def _has_own_bias(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in CORRECTED or len(node.input) < 3 or node.input[1] not in self._dequantized:
            return False
        source = self._dequantized.get(node.input[2])
        tensor = self._stored.get(node.input[2] if source is None else source.input[0])
        return tensor is not None and self._readers[tensor.name] == 1

    def step(self, layer: str) -> NDArray[np.float32] | None:
        """Return the step of a layer's bias, (channels,); None if the bias is float."""
        source = self._dequantized.get(self._names[layer])
        return None if source is None else numpy_helper.to_array(self._stored[source.input[1]])

    def add(self, layer: str, shift: NDArray[Any]) -> None:
        """Add a shift, (channels,), to the bias of a layer."""
        source, step = self._dequantized.get(self._names[layer]), self.step(layer)
        if source is None:
            tensor = self._stored[self._names[layer]]
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values + shift).astype(values.dtype), tensor.name))
            return
        tensor = self._stored[source.input[0]]
        integers = numpy_helper.to_array(tensor) + np.round(shift / step)
        clipped = integers.clip(-BIAS_MAX, BIAS_MAX).astype(np.int32)
        tensor.CopyFrom(numpy_helper.from_array(clipped, tensor.name))


def _with_means(proto: onnx.ModelProto, layers: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy that computes the mean output of layers, (1, channels, 1, ...), and the names of these means."""
    copy = _copied(proto)
    nodes = {node.name: node for node in copy.graph.node}
    for index, name in enumerate(layers):
        _append_mean(copy, nodes[name], nodes[name].output[0], index)
    return copy, [f"{NEW}.mean.{index}" for index in range(len(layers))]


def _with_shifts(
    proto: onnx.ModelProto, layers: Sequence[str], steps: Sequence[NDArray[np.float32] | None]
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy that shifts the outputs of layers, and the names of the shifts.

    shift = target - mean, rounded to ``steps`` where the bias will be.
    """
    copy = _copied(proto)
    nodes = {node.name: node for node in copy.graph.node}
    for index, name in enumerate(layers):
        output, raw = nodes[name].output[0], f"{NEW}.raw.{index}"
        nodes[name].output[0] = raw
        rank = _append_mean(copy, nodes[name], raw, index)
        target, mean, off, scaled, whole, shift, step = (
            f"{NEW}.{role}.{index}" for role in ("target", "mean", "off", "scaled", "whole", "shift", "step")
        )
        unit = steps[index]
        values = np.ones(1, np.float32) if unit is None else unit
        copy.graph.initializer.append(numpy_helper.from_array(values.reshape(1, -1, *[1] * (rank - 2)), step))
        rounding = "Identity" if unit is None else "Round"
        copy.graph.input.append(helper.make_tensor_value_info(target, TensorProto.FLOAT, [None] * rank))
        copy.graph.node.extend(
            helper.make_node(op, given, [made], f"{NEW}.{op}.{made}")
            for op, given, made in (
                ("Sub", (target, mean), off), ("Div", (off, step), scaled), (rounding, (scaled,), whole),
                ("Mul", (whole, step), shift), ("Add", (raw, shift), output),
            )
        )  # fmt: skip
    return copy, [f"{NEW}.shift.{index}" for index in range(len(layers))]


def _append_mean(copy: onnx.ModelProto, layer: onnx.NodeProto, output: str, index: int) -> int:
    """Append the mean of a layer's output over everything but the channels; return the output's rank."""
    rank = 2 if layer.op_type == "Gemm" else _weight_rank(copy, layer)
    axes = [axis for axis in range(rank) if axis != 1]
    opset = next(entry.version for entry in copy.opset_import if entry.domain in ("", "ai.onnx"))
    name = f"{NEW}.mean.{index}"
    if opset < AXES_ARE_INPUTS:
        copy.graph.node.append(helper.make_node("ReduceMean", [output], [name], name, axes=axes))
    else:
        copy.graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{name}.axes"))
        copy.graph.node.append(helper.make_node("ReduceMean", [output, f"{name}.axes"], [name], name))
    return rank


def _weight_rank(proto: onnx.ModelProto, layer: onnx.NodeProto) -> int:
    """Return the rank of a layer's weight, behind its DequantizeLinear if it has one."""
    sources = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == DEQUANTIZE}
    stored = sources.get(layer.input[1], layer.input[1])
    return next(len(tensor.dims) for tensor in proto.graph.initializer if tensor.name == stored)


def _copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy
