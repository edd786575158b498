"""Sums that are exactly zero in integers are exactly zero in torch: no rounding error decides a sign."""

import pytest
import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec
from micronet.models.layers import ChannelShuffle, ConvBNReLU, initialise
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model

IMAGES = torch.randn(64, 3, 32, 32)


def untrained(w_bits, **config):
    """A network as initialised: batch norms have mean 0 and shift 0, so every threshold is exactly 0."""
    model = nn.Sequential(  # of nin_gc, a block of each kind
        ConvBNReLU(3, 16, 5), ConvBNReLU(16, 16, 1, groups=2), ChannelShuffle(2), nn.MaxPool2d(3, 2, 1),
        ConvBNReLU(16, 24, 3, groups=4), ConvBNReLU(24, 24, 1), ConvBNReLU(24, 10, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    initialise(model)
    model, record = quantize_model(model, QuantConfig(w_bits=w_bits, a_bits="binary", **config))
    calibrate(model, [IMAGES])
    return Artifact(model.eval(), ModelSpec("nin_gc", {}), [record])


PAIRS = [  # every two of bits, training with folded norms, and folding afterwards
    ("ternary", {}, False), ("ternary", {"bn_fuse": True}, True), ("binary", {}, True),
    ("binary", {"bn_fuse": True}, False), (2, {}, False), (2, {"bn_fuse": True}, True),
]  # fmt: skip


@pytest.mark.parametrize(("w_bits", "config", "fused"), PAIRS, ids=str)
def test_an_untrained_network_agrees_with_its_packed_file(w_bits, config, fused):
    from micronet.onnx.export import to_onnx
    from micronet.packed.from_onnx import pack_model
    from micronet.runtimes.packed.numpy_backend import run

    artifact = untrained(w_bits, **config)
    if fused:
        model, record = fold_model(artifact.model, artifact.history)
        artifact = artifact.after(record, model=model.eval())
    packed = run(pack_model(to_onnx(artifact, IMAGES)), IMAGES.numpy())
    with torch.no_grad():
        expected = artifact.model(IMAGES).numpy()
    assert (packed.argmax(1) == expected.argmax(1)).mean() == 1


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3, bias=False), nn.Linear(4, 6)])
@pytest.mark.parametrize("w_bits", ["ternary", "binary", 2])
def test_levels_before_scales_change_neither_output_nor_gradient(layer, w_bits, monkeypatch):
    model, _ = quantize_model(nn.Sequential(layer), QuantConfig(w_bits=w_bits, a_bits=32, first_last="same"))
    model = model.double()
    x = torch.randn(5, 4, *[6] * (layer.weight.dim() - 2), dtype=torch.float64)
    calibrate(model, [x])
    found = []
    for unit_levels in (True, False):
        monkeypatch.setattr(model[0].weight_quantizer, "unit_levels", unit_levels)
        out = model(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
