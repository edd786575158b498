"""ONNX models become packed programs, and operators that the packed runtime does not have are named."""

import numpy as np
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


def convert(model):
    return pack_model(to_onnx(Artifact(model.eval(), ModelSpec("x.py:Model")), IMAGES))


class Reshaped(nn.Module):
    """Feature maps of 8 channels and 5 x 5 pixels, shuffled if asked, in another shape."""

    def __init__(self, shuffled, shape):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 7)
        self.shuffled, self.shape = shuffled, shape

    def forward(self, x):
        x = self.conv(x)
        if self.shuffled:
            x = x.reshape(-1, 2, 4, 5, 5).transpose(1, 2)
        return x.reshape(self.shape)


def test_a_shuffle_may_end_flat():
    model = Reshaped(True, (-1, 200)).eval()
    found = run(convert(model), IMAGES.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, model(IMAGES).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shuffled", "shape"), [(False, (-1, 8)), (True, (-1, 8)), (True, (-1, 40, 1, 5))])
def test_other_reshapes_are_named(shuffled, shape):
    with pytest.raises(MicronetError, match=r"Reshape.*: the packed runtime (reshapes|shuffles)"):
        convert(Reshaped(shuffled, shape))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 32), nn.Flatten(), nn.LayerNorm(8)), "does not have .*LayerNormalization"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 1, dilation=2), nn.Flatten()), "dilated pools"),
    ],
    ids=["operator", "dilation"],
)
def test_what_the_runtime_does_not_have_is_named(model, message):
    with pytest.raises(MicronetError, match=message):
        convert(model)
