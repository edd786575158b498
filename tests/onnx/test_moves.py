"""Operators that move values, and gates, must not stop integers on their way from layer to layer."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnxruntime import GraphOptimizationLevel

from micronet.artifact.artifact import Artifact
from micronet.core.progress import Silent
from micronet.errors import FailedError
from micronet.models.build import ModelSpec
from micronet.onnx import channel_padding, export, layer_agreement
from micronet.onnx.export import to_onnx, with_pairs
from micronet.onnx.gates import quantize_gates
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_integer_layers
from micronet.onnx.layer_agreement import compare_inside, compare_layers
from micronet.onnx.moves import requantize_moves
from micronet.onnx.ops import SMOOTH
from micronet.onnx.speed import without_quantizers
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.quantization.quantize import quantize_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, optimize
from micronet.stages import quantize_onnx
from micronet.stages.config import DataConfig
from micronet.stages.float_model import FloatModel
from micronet.stages.quantize_onnx import to_int8
from tests.onnx.networks import IMAGES


class Moves(torch.nn.Module):
    """Convolutions with operators between them that only move values, one kind per attribute ``move``."""

    def __init__(self, move, channels):
        super().__init__()
        self.move = move
        self.first, self.last = torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(channels, 8, 1)

    def forward(self, x):
        return torch.nn.functional.relu(self.last(self.move(self.first(x)))).mean((2, 3))


MOVES = {
    "halves": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 16),
    "part": (lambda x: x[:, 8:], 8),
    "roll": (lambda x: torch.roll(x, 2, 2), 16),
    "flip": (lambda x: x.flip(3), 16),
    "pixel shuffle": (torch.nn.PixelShuffle(2), 4),
    "pixel unshuffle": (torch.nn.PixelUnshuffle(2), 64),
    "nearest": (torch.nn.Upsample(scale_factor=2), 16),
    "padded, then split": (lambda x: torch.nn.functional.pad(x, (1, 2)).permute(0, 1, 3, 2).chunk(2, 1)[1], 8),
    "strides": (lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1), 32),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_between_layers_keep_them_in_integers(name):
    torch.manual_seed(0)
    model, record = quantize_model(Moves(*MOVES[name]).eval(), QuantConfig(), IMAGES)
    calibrate(model, [IMAGES])
    artifact = Artifact(model, ModelSpec("mine.py:Mine"), [record])
    proto = to_onnx(artifact, IMAGES)
    assert max(compare_layers(model, proto, IMAGES).values()) <= 1
    found = count_integer_layers(proto)
    assert found["convolutions"] == {"integer": 2, "all": 2} and not found["float"]


def test_quantized_constants_are_stored_as_integers_and_nothing_unused_is():
    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1)
            self.position = torch.nn.Parameter(torch.randn(1, 8, *IMAGES.shape[2:]))

        def forward(self, x):
            return self.last(self.first(x) + self.position).mean((2, 3))

    model, record = quantize_model(Positions().eval(), QuantConfig(), IMAGES)
    calibrate(model, [IMAGES])
    proto = to_onnx(Artifact(model, ModelSpec("mine.py:Mine"), [record]), IMAGES)
    assert max(compare_layers(model, proto, IMAGES).values()) <= 1
    stored = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in proto.graph.initializer}
    read = {name: node for node in proto.graph.node for name in node.input}
    assert (onnx.TensorProto.UINT8, [1, 8, *IMAGES.shape[2:]]) in stored.values() and stored.keys() <= read.keys()
    assert not any(node.op_type == "QuantizeLinear" and node.input[0] in stored for node in proto.graph.node)


@pytest.mark.parametrize("pad", [lambda x: torch.nn.functional.pad(x, (0, 1, 1, 2)), torch.nn.ZeroPad2d((0, 1, 1, 2))])
def test_zeros_around_a_tensor_become_the_next_convolutions(pad):
    model, record = quantize_model(Moves(pad, 16).eval(), QuantConfig(), IMAGES)
    calibrate(model, [IMAGES])
    proto = to_onnx(Artifact(model, ModelSpec("mine.py:Mine"), [record]), IMAGES)
    assert max(compare_layers(model, proto, IMAGES).values()) <= 1
    optimized = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert "Pad" not in {node.op_type for node in optimized.graph.node}


@pytest.mark.parametrize("stored", [True, False])
def test_tensors_of_unknown_scales_do_not_share_a_grid(stored):
    scales, given = ("float s = {0.5}, float t = {0.5}, ", "") if stored else ("", ", float s, float t")
    model = onnx_ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 21]> g (float[1, 8, 4, 4] x{given}) => (float[1, 4, 4, 4] y)
            <{scales}uint8 z = {{0}}, float[1] w = {{0}}>
            {{ a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)
              c = QuantizeLinear(x, t, z) d = DequantizeLinear(c, t, z) e = Concat<axis = 1>(b, d) y = Conv(e, w) }}"""
        )
    )
    requantize_moves(model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == (3 if stored else 2)


GATES = {"silu": torch.nn.SiLU(), "hardswish": torch.nn.Hardswish(), "swish": lambda x: x * torch.sigmoid(x)}


@pytest.mark.parametrize("name", GATES)
def test_gates_run_in_integers_and_move_nothing_by_more_than_a_step(name):
    torch.manual_seed(0)
    model, record = quantize_model(Moves(GATES[name], 16).eval(), QuantConfig(), IMAGES)
    calibrate(model, [4 * IMAGES])
    artifact = Artifact(model, ModelSpec("mine.py:Mine"), [record])
    proto, plain = (to_onnx(artifact, IMAGES, pairs=pairs) for pairs in (True, False))
    assert max(compare_layers(model, proto, IMAGES).values()) <= 1
    operators = [
        node.op_type for node in optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL).graph.node
    ]
    assert "QLinearMul" in operators and not SMOOTH & set(operators)
    assert list(with_pairs(plain).graph.node) == list(proto.graph.node)
    floats = [without_quantizers(each) for each in (proto, plain)]
    session = [open_session(each.SerializeToString(), RuntimeOptions(), "it") for each in floats]
    one, other = (each.run(None, {"images": IMAGES.numpy()})[0] for each in session)
    values = IMAGES[0, 0].numel()  # none negative; their mean in one order or another
    assert np.allclose(one, other, rtol=values * 2.0**-23, atol=0)


class Depthwise(torch.nn.Module):
    """A depthwise convolution of 12 channels, and what else reads or writes them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem, self.depthwise = torch.nn.Conv2d(3, 12, 1), torch.nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate, self.last = torch.nn.Conv2d(12, 12, 1), torch.nn.Conv2d(24 if kind == "concat" else 12, 8, 1)

    def forward(self, x):
        before = torch.nn.functional.hardswish(self.stem(x))
        after = self.depthwise(before).relu()
        if self.kind == "gate":
            after = after * torch.sigmoid(self.gate(after.mean((2, 3), keepdim=True)))
        elif self.kind == "sum":
            after = before + after
        elif self.kind == "concat":
            after = torch.cat([before, after], 1)
        return self.last(after).flatten(1)


def _shapes(node, proto):
    """Return the shapes of a convolution's weight and bias, and its attributes."""
    return [list(each.dims) for each in proto.graph.initializer if each.name in node.input], node.attribute


@pytest.mark.parametrize("kind", ["chain", "gate", "sum", "concat"])
def test_channels_of_zeros_change_no_value(kind, monkeypatch):
    torch.manual_seed(0)
    model, record = quantize_model(Depthwise(kind).eval(), QuantConfig(), IMAGES)
    calibrate(model, [IMAGES])
    artifact = Artifact(model, ModelSpec("mine.py:Mine"), [record])
    monkeypatch.setattr(channel_padding, "FEWEST_PRODUCTS", 1)  # the images are small
    padded = to_onnx(artifact, IMAGES)
    assert max(compare_layers(model, padded, IMAGES).values()) <= 1
    counts = count_integer_layers(padded)
    assert counts["padded"] == 1
    words = "padded with zeros to a multiple of 16 channels, which ONNX Runtime computes at a time"
    assert describe(counts)[-1] == f"1 depthwise convolution {words}; for a smaller file, prune with --regular 16"
    foreign = onnx.ModelProto()
    foreign.CopyFrom(padded)
    del foreign.metadata_props[:]  # no command prunes the files of other tools
    assert describe(count_integer_layers(foreign))[-1] == f"1 depthwise convolution {words}"
    assert counts["convolutions"]["integer"] == counts["convolutions"]["all"]
    monkeypatch.setattr(export, "pad_depthwise", lambda graph: None)
    plain = to_onnx(artifact, IMAGES)
    assert padded.ByteSize() > plain.ByteSize()
    for one, other in ((padded, plain), tuple(map(without_quantizers, (padded, plain)))):
        sessions = [open_session(each.SerializeToString(), RuntimeOptions(), "it") for each in (one, other)]
        assert np.array_equal(*(each.run(None, {"images": IMAGES.numpy()})[0] for each in sessions))
    shapes = [[_shapes(node, it) for node in it.graph.node if node.op_type == "Conv"] for it in (one, other)]
    assert shapes[0] == shapes[1]


def test_weights_with_zero_points_are_not_padded(monkeypatch):
    torch.manual_seed(0)
    model, record = quantize_model(Depthwise("chain").eval(), QuantConfig(q_type="asym"), IMAGES)
    calibrate(model, [IMAGES])
    artifact = Artifact(model, ModelSpec("mine.py:Mine"), [record])
    padded = to_onnx(artifact, IMAGES)
    monkeypatch.setattr(export, "pad_depthwise", lambda graph: None)
    assert padded.graph == to_onnx(artifact, IMAGES).graph


def test_channels_of_zeros_change_no_value_of_an_onnx_file(monkeypatch):
    torch.manual_seed(0)
    floats = to_onnx(Artifact(Depthwise("chain").eval(), ModelSpec("mine.py:Mine"), []), IMAGES)
    model, feeds = FloatModel(floats, Path("d.onnx"), DataConfig(), seed=0), [{"images": IMAGES.numpy()}]
    files = [to_int8(model, RangeConfig(), QuantConfig(), Silent(), feeds)[0]]
    monkeypatch.setattr(quantize_onnx, "with_padded_channels", lambda proto: proto)
    files.append(to_int8(model, RangeConfig(), QuantConfig(), Silent(), feeds)[0])
    one, other = (
        open_session(each.SerializeToString(), RuntimeOptions(), "it").run(None, feeds[0])[0] for each in files
    )
    assert np.array_equal(one, other)
    assert [any(16 in each.dims for each in file.graph.initializer) for file in files] == [True, False]


@pytest.mark.parametrize("step", [0.02, 20.0])
def test_a_gate_on_a_grid_of_any_width_is_tried_without_overflow(step):
    model = onnx_ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 21]> g (float[4] x) => (float[4] y)
            <float s = {{{step}}}, uint8 z = {{128}}>
            {{ a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) c = Sigmoid(b) d = Mul(b, c)
              e = QuantizeLinear(d, s, z) y = DequantizeLinear(e, s, z) }}"""
        )
    )
    with np.errstate(over="raise", invalid="raise"):
        quantize_gates(model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 3


class Experts(torch.nn.Module):
    """A mixture of experts, each of which writes its rows into one tensor."""

    def __init__(self, adds):
        super().__init__()
        self.experts, self.last = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)]), torch.nn.Linear(8, 3)
        self.adds = adds

    def forward(self, x):
        out, choice = torch.zeros_like(x), (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            rows = torch.where(choice == number)[0]
            if self.adds:
                out.index_add_(0, rows, expert(x[rows]))
            else:
                out[rows] = expert(x[rows])
        return self.last(out)


def test_a_tensor_that_the_forward_writes_into_is_quantized_as_it_is_read(monkeypatch):
    torch.manual_seed(0)
    rows, config = torch.randn(16, 8), QuantConfig(first_last="8bit")
    model, record = quantize_model(Experts(adds=True).eval(), config, rows)
    calibrate(model, [rows])
    for placed in (record, quantize_model(Experts(adds=False).eval(), config, rows)[1]):
        assert placed.result["inputs"]["last"] == "last.input_quantizer"
    proto = to_onnx(Artifact(model, ModelSpec("mine.py:Mine"), [record]), rows)
    steps, error = compare_inside(model, proto, rows)
    assert max(steps.values()) <= 1 and error < 1e-3
    outputs, integers = layer_agreement._integers(proto, rows)
    one_less = {name: [array[1:] for array in calls] for name, calls in integers.items()}
    monkeypatch.setattr(layer_agreement, "_integers", lambda *_: (outputs, one_less))
    with pytest.raises(FailedError, match=r"has the shape \(12, 8\) in torch and \(11, 8\) .* selects values by"):
        compare_inside(model, proto, rows)
