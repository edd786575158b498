"""Bias correction of quantized ONNX networks: each layer's mean output becomes that of the float network.

Nagel et al. 2019, arXiv:1906.04721, section 4.2, with calibration inputs instead of an assumed distribution. Front to
back, since each correction changes what later layers read.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from micronet.core.progress import Progress
from micronet.onnx.feeds import Feed
from micronet.onnx.insertion import BIAS_MAX, FLOAT_OUTPUT
from micronet.onnx.ops import DEQUANTIZE
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import exposing_session, open_session

CORRECTED = ("Conv", "Gemm")  # both have their channels on axis 1 of the output
Means = dict[str, NDArray[np.float64]]


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
    named = {name for node in folded.graph.node for name in node.output}
    given = [node.output[0] for node in biases.layers]
    outputs = {name: name if name in named else name.removesuffix(FLOAT_OUTPUT) for name in given}
    outputs = {name: original for name, original in outputs.items() if original in named}
    if not outputs:
        return 0
    originals = list(outputs.values())
    targets = _means(exposing_session(folded, originals), originals, feeds)
    for done, (name, original) in enumerate(outputs.items(), 1):
        biases.add(name, targets[original] - _means(_session_up_to(int8, name), [name], feeds)[name])
        progress.step("correcting biases", done, len(outputs))
    return len(outputs)


class _Biases:
    """The biases of a quantized model's layers, by the name of the layer's output."""

    def __init__(self, int8: onnx.ModelProto) -> None:
        self._stored = {tensor.name: tensor for tensor in int8.graph.initializer}
        self._dequantized = {node.output[0]: node for node in int8.graph.node if node.op_type == DEQUANTIZE}
        self._readers = Counter(name for node in int8.graph.node for name in node.input)
        self.layers = [node for node in int8.graph.node if self._has_own_bias(node)]
        self._names = {node.output[0]: node.input[2] for node in self.layers}

    def _has_own_bias(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in CORRECTED or len(node.input) < 3 or node.input[1] not in self._dequantized:
            return False
        source = self._dequantized.get(node.input[2])
        tensor = self._stored.get(node.input[2] if source is None else source.input[0])
        return tensor is not None and self._readers[tensor.name] == 1

    def add(self, output: str, shift: NDArray[np.float64]) -> None:
        """Add a shift, (channels,), to the bias of the layer with this output."""
        source = self._dequantized.get(self._names[output])
        if source is None:
            tensor = self._stored[self._names[output]]
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values + shift).astype(values.dtype), tensor.name))
            return
        tensor, step = self._stored[source.input[0]], numpy_helper.to_array(self._stored[source.input[1]])
        integers = numpy_helper.to_array(tensor) + np.round(shift / step)
        clipped = integers.clip(-BIAS_MAX, BIAS_MAX).astype(np.int32)
        tensor.CopyFrom(numpy_helper.from_array(clipped, tensor.name))


def _session_up_to(proto: onnx.ModelProto, name: str) -> Any:
    """Open a session that computes one inner tensor, and nothing that it does not depend on."""
    model = ir.from_proto(proto)
    model.graph.outputs[:] = [value for node in model.graph for value in node.outputs if value.name == name]
    RemoveUnusedNodesPass()(model)
    return open_session(ir.to_proto(model).SerializeToString(), RuntimeOptions(), "the model")


def _means(session: Any, names: list[str], feeds: Iterable[Feed]) -> Means:
    """Return the mean of each tensor, (channels,), over all inputs and places."""
    given = {entry.name for entry in session.get_inputs()}
    sums, total = dict.fromkeys(names, np.zeros(1)), 0
    for feed in feeds:
        samples = len(next(iter(feed.values())))
        own = {name: values for name, values in feed.items() if name in given}
        for name, values in zip(names, session.run(names, own), strict=True):
            axes = tuple(axis for axis in range(values.ndim) if axis != 1)
            sums[name] = sums[name] + samples * values.mean(axes, dtype=np.float64)
        total += samples
    return {name: value / total for name, value in sums.items()}
