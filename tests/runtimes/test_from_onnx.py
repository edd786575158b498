"""ONNX models become packed programs, and operators that the packed runtime cannot run are named."""

import inspect

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from micronet import registry
from micronet.artifact.artifact import Artifact
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.packed.numpy_backend import run
from tests.onnx.test_onnx import IMAGES


class Shuffled(nn.Module):
    """Feature maps of 8 channels and 5 x 5 pixels, shuffled and flattened at once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 7)

    def forward(self, x):
        return self.conv(x).reshape(-1, 2, 4, 5, 5).transpose(1, 2).reshape(-1, 200)


def test_a_shuffle_may_end_flat():
    model = Shuffled().eval()
    program = pack_model(to_onnx(Artifact(model, ModelSpec("x.py:Shuffled")), IMAGES))
    with torch.no_grad():
        np.testing.assert_allclose(run(program, IMAGES.numpy()), model(IMAGES).numpy(), rtol=1e-4, atol=1e-5)


def parse(nodes, last=(-1, 8), out="?, ?, ?"):
    """An ONNX model of an input x, 8 channels of 5 x 5, and named constants."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[N, 8, 5, 5] x) => (float[N, {out}] out)
        <int64[5] grouped = {{-1, 2, 4, 5, 5}}, int64[1] channels = {{1}}, int64[2] sides = {{2, 3}},
         int64[4] same = {{-1, 8, 5, 5}}, float[8, 8, 3, 3] kernel,
         int64[{len(last)}] last = {{{", ".join(map(str, last))}}}>
        {{ {nodes} }}
    """)
    for index, node in enumerate(model.graph.node):
        node.name = node.op_type if node.output[0] == node.op_type else f"layer{index}.{node.op_type}"
    return model


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("out = Reshape (x, last)", "supported to flatten feature maps or to shuffle channels: layer0"),
        ("y = Reshape (x, grouped) z = Transpose <perm = [0, 2, 1, 3, 4]> (y) out = Reshape (z, last)",
         "shuffles are only supported if they preserve the shape: layer0"),
        ("out = Transpose <perm = [0, 2, 3, 1]> (x)", "Transpose is not supported: layer0"),
        ("out = LayerNormalization <axis = 1> (x, x)", "LayerNormalization is not supported: layer0"),
        ("out = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (x)", "MaxPool with dilation is not supported"),
        ("out = ReduceMean (x, channels)", r"only supported over height and width, not over axes \[1\]: layer0"),
        ("y = Relu (x) out = Conv (x, y)", "y is not a constant"),
        ("y = Conv <kernel_shape = [3, 3]> (x, kernel) Cos = Cos (y) out = Relu (Cos)",
         r"Cos is not supported: Cos \(a function call after layer0\)"),
        ("y = Softmax (x) z = Softmax (y) w = Cos (z) out = Relu (w)",
         "3 of .* 4 operators:\n  Softmax is not supported: layer0, layer1\\.\n  Cos is not supported: layer2\\."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [[-1, 8], [-1, 40, 1, 5]])
def test_what_the_runtime_cannot_run_is_named(nodes, message, last):
    with pytest.raises(MicronetError, match=message):
        pack_model(parse(nodes, last))


def test_the_line_of_the_users_code_and_the_targets_that_run_it_are_named(monkeypatch):
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", False)  # conftest.py saves their time

    class Sums(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    artifact = Artifact(Sums().eval(), ModelSpec("x.py:Sums"))
    place = f"{__file__}:{inspect.getsourcelines(Sums.forward)[1] + 1}"
    with pytest.raises(MicronetError) as caught:
        pack_model(to_onnx(artifact, IMAGES, pairs=False))
    assert f"  CumSum is not supported: CumSum at {place} (return torch.cumsum(x, 1)).\n" in str(caught.value)
    assert "run micronet export --target onnxruntime or openvino instead" in str(caught.value)
    assert set(registry.RUN_PACKED) <= registry.TARGETS.keys()
    assert (
        __file__.encode() not in to_onnx(artifact, IMAGES).SerializeToString()
    )  # files do not say where they were made


def test_what_only_computes_shapes_is_not_needed():
    assert [each.kind for each in pack_model(parse("unused = Softmax (x) out = Relu (x)")).operations] == ["relu"]


@pytest.mark.parametrize("nodes", [
    "y = Relu (x) out = Reshape (y, same)",
    "y = Reshape (x, same) out = Relu (y)",
    "z = ReduceMean <keepdims = 0> (x, sides) y = Flatten (z) out = Relu (y)",
])  # fmt: skip
def test_a_reshape_that_changes_nothing_is_left_out(nodes):
    kinds = [each.kind for each in pack_model(parse(nodes, out="?, ?, ?" if "same" in nodes else "?")).operations]
    assert kinds in (["relu"], ["mean", "relu"])


def test_a_network_that_returns_constants_is_refused():
    model = parse("out = Relu (x)")
    model.graph.output.append(onnx.helper.make_tensor_value_info("kernel", onnx.TensorProto.FLOAT, None))
    with pytest.raises(MicronetError, match=r"return constants \(kernel\)"):
        pack_model(model)


def test_images_need_a_known_size():
    model = parse("out = Relu (x)")
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    with pytest.raises(MicronetError, match=r"takes x \(8, 0, 5\); export it with fixed sizes"):
        pack_model(model)
