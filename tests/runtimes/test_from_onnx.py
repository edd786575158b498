"""ONNX models become packed programs, and operators that the packed runtime does not have are named."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("out = Reshape (x, last)", "Reshape_0: the packed runtime only supports reshapes that flatten or shuffle"),
        ("y = Reshape (x, grouped) z = Transpose <perm = [0, 2, 1, 3, 4]> (y) out = Reshape (z, last)",
         "Reshape_2: the packed runtime only supports channel shuffles that preserve the shape"),
        ("out = LayerNormalization <axis = 1> (x, x)", "does not support LayerNormalization; use the ONNX file"),
        ("out = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (x)", "does not support dilated pooling"),
        ("out = GlobalMaxPool (x) unused = Softmax (x)", "does not support GlobalMaxPool, Softmax"),
        ("out = ReduceMean (x, channels)", r"only supports averages over height and width, not over axes \[1\]"),
        ("y = Relu (x) out = Conv (x, y)", "y is not a constant"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [[-1, 8], [-1, 40, 1, 5]])
def test_what_the_runtime_does_not_have_is_named(nodes, message, last):
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[N, 8, 5, 5] x) => (float[N, ?, ?, ?] out)
        <int64[5] grouped = {{-1, 2, 4, 5, 5}}, int64[1] channels = {{1}},
         int64[{len(last)}] last = {{{", ".join(map(str, last))}}}>
        {{ {nodes} }}
    """)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    with pytest.raises(MicronetError, match=message):
        pack_model(model)
