"""A grid that begins at 0 does the work of the ReLU before it: the same values, gradients and ranges."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.quantization.calibrate import calibrate, frozen, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.quantization.schemes.dorefa import ClippedQuantizer
from micronet.quantization.schemes.iao import AffineQuantizer
from micronet.quantization.schemes.lsq import LearnedQuantizer

X = torch.randn(4, 6, 9, 9) * 2
QUANTIZERS = {
    "iao": lambda: AffineQuantizer(4, True, False, False, "moving-average"),
    "iao asymmetric": lambda: AffineQuantizer(4, False, False, False, "moving-average"),
    "iao signed": lambda: AffineQuantizer(4, True, True, False, "moving-average"),
    "dorefa": lambda: ClippedQuantizer(4, False, 1.0),
    "lsq": lambda: LearnedQuantizer(4, False, False),
    "lsq signed": lambda: LearnedQuantizer(4, True, False),
}


def pull(call, quantizer):
    """Observe twice, compute, and return the output, the input's gradient, and the state."""
    x = X.clone().requires_grad_()
    quantizer.observing = True
    call(quantizer, 3 * X)
    out = call(quantizer, x)
    (out * torch.linspace(-1, 1, X.numel()).view_as(X)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in quantizer.parameters() if p.requires_grad)], quantizer.state_dict()


@pytest.mark.parametrize("is_frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_rectified_is_forward_of_a_relu(name, is_frozen):
    plain = QUANTIZERS[name]()
    plain.observe(X.clamp(min=0))
    if is_frozen:
        plain.freeze()
    short = copy.deepcopy(plain)
    expected, state = pull(lambda quantizer, x: quantizer(F.relu(x)), plain)
    found, short_state = pull(lambda quantizer, x: quantizer(x, rectified=True), short)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert all(torch.equal(state[key], short_state[key]) for key in state)


def test_a_range_that_reaches_below_zero_still_gets_the_relu():
    quantizer = AffineQuantizer(4, False, False, False, "moving-average")
    quantizer.observe(X)
    assert quantizer.zero_point > 0
    assert torch.equal(quantizer(X, rectified=True), quantizer(F.relu(X)))


class ReadTwice(nn.Module):
    """Its second ReLU works in place on what the sum reads afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.relu_a = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)
        self.b, self.relu_b = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.b(self.relu_a(self.a(x)))
        return self.c(self.relu_b(y)) + y


def test_a_relu_in_place_stays_where_its_input_is_read_again():
    images = torch.randn(4, 3, 8, 8)
    model = ReadTwice()
    quantized, record = quantize_model(model, QuantConfig(w_bits=16, a_bits=16))
    assert record.result["out_of_place"] == ["relu_a"]
    calibrate(quantized, [images])
    torch.testing.assert_close(quantized(images), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", [observing, frozen])
def test_a_network_trains_as_with_its_relus(context):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    short, record = quantize_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)), QuantConfig()
    )
    assert record.result["out_of_place"] == ["2"]
    calibrate(short, [images])
    plain = copy.deepcopy(short)
    plain[2].inplace = True  # the way of a ReLU that has other readers
    for model in (short, plain):
        with context(model.train()):
            model(images).square().sum().backward()
    for left, right in zip(short.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)
