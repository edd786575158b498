"""Heads of ONNX files that one 8-bit scale would destroy stay in float, and only those."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.onnx import posttraining as pt
from micronet.onnx.heads import find_destroyed, first_and_last, heads
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session
from micronet.stages.config import DataConfig
from micronet.stages.quantize_onnx import FloatModel, to_int8
from tests.onnx.foreign import IMAGE, Net, inputs_for

REASON = "the 8-bit scale of its output gives channel 4 fewer than 4 levels"


def detector(factors, offset=0.0, together=True):
    """Return a network whose head gives boxes and scores, in one tensor or in two."""
    net = Net()
    a = net("Relu", net.conv("x", 3, 16))
    factors = np.asarray(factors, np.float32).reshape(-1, 1, 1, 1)
    weight, bias = net.weight(5, 16, 1, 1) * factors, np.full(5, offset, np.float32)
    if together:
        return net.model(IMAGE, {net("Conv", a, weight, bias): 4})
    parts = [net("Conv", a, weight[part], bias[part]) for part in (slice(4), slice(4, None))]
    return net.model(IMAGE, dict.fromkeys(parts, 4))


@pytest.mark.parametrize(
    ("factors", "offset", "together", "destroyed"),
    [
        ([1] * 5, 0, True, []),
        ([500] * 4 + [1], 0, True, [1]),  # boxes of hundreds of pixels beside a score
        ([500] * 4 + [1], 0, False, []),  # each has its own scale
        ([1000] * 4 + [0.01], 100, True, [1]),  # a constant but for less than a step
        ([500] * 4 + [0], 0, True, []),  # zero is exact
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_head_of_unequal_channels_stays_float(factors, offset, together, destroyed, signed):
    proto = detector(factors, offset, together)
    folded, feeds = pt.prepare(proto), inputs_for(proto)
    ranges = pt.find_ranges(pt.collect(folded, feeds, signed=signed), "minmax", 100.0, signed=signed)
    found = find_destroyed(folded, ranges, feeds, signed=signed)
    layers = [node.name for node in folded.graph.node if node.op_type == "Conv"]
    assert found == {layers[index]: REASON for index in destroyed}
    small = pt.quantize_onnx(folded, ranges, signed=signed, per_channel=True, bits=8, excluded=found)
    assert pt.left_float(folded, signed=signed, allowed=ranges.keys(), excluded=found) == found
    if destroyed:
        wanted, got = (
            np.concatenate([session.run(None, feed)[0][:, 4] for feed in feeds])
            for session in (open_session(p.SerializeToString(), RuntimeOptions(), "p") for p in (proto, small))
        )
        assert np.abs(got - wanted).max() < np.ptp(wanted) / 4  # less than the steps it would have had


def test_heads_are_the_layers_that_no_other_repairs():
    """Behind another layer, or in a sum with another's results, an output's scale is not the layer's."""
    net = Net()
    first = net.conv("x", 3, 8)
    second = net.conv(first, 8, 8)
    summed = net("Add", first, second)
    gated = net("Mul", net.conv(first, 8, 8), net("Sigmoid", summed))
    sized = net("Reshape", gated, net("Shape", second))
    proto = net.model(IMAGE, {summed: 4, sized: 4})
    assert [node.outputs[0].name for node in heads(ir.from_proto(proto).graph)] == [net.nodes[3].output[0]]


def test_first_last_decides_over_what_8_bits_destroy():
    """``float`` leaves the layers at both ends in float, the others quantize every layer."""
    proto = detector([500] * 4 + [1])
    folded, feeds = pt.prepare(proto), inputs_for(proto)
    layers = [node.name for node in folded.graph.node if node.op_type == "Conv"]
    assert [str(node.name) for node in first_and_last(ir.from_proto(folded).graph)] == layers
    model = FloatModel(proto, Path("d.onnx"), DataConfig(), seed=0)

    def floats(**settings):
        return to_int8(model, RangeConfig(), QuantConfig(**settings), Silent(), feeds)[1]

    assert floats() == {layers[1]: REASON}
    assert floats(first_last="8bit") == floats(first_last="same") == {}
    with pytest.raises(MicronetError, match="first or last"):
        floats(first_last="float")
