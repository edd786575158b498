"""The laws of quantizers, over every registered scheme."""

import numpy as np
import pytest
import torch

from micronet import registry
from micronet.errors import MicronetError
from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import QParams, fake_quantize
from micronet.quantization.observers import MinMax, MovingAverage
from micronet.quantization.quantizer import rebuild

CASES = [
    (method, bits, q_type, q_level, slot)
    for method in registry.SCHEMES
    for bits in (2, 4, 8, 16)
    for q_type in ("sym", "asym")
    for q_level in ("channel", "layer")
    for slot in ("weight", "activation", "non-negative")
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def quantizer(request):
    method, bits, q_type, q_level, slot = request.param
    config = QuantConfig(method=method, w_bits=bits, a_bits=bits, q_type=q_type, q_level=q_level)
    scheme = registry.resolve(registry.SCHEMES, method, "method")
    if slot == "weight":
        return scheme.weight_quantizer(config, bits, 0, 6)
    return scheme.activation_quantizer(config, bits, non_negative=slot == "non-negative")


def sample():
    x = torch.randn(6, 5, 4)
    x[2] = 0  # an all-zero filter
    x[3] = x[3].abs()
    return x


def test_levels_integers_and_zero(quantizer):
    x = sample()
    quantizer.observe(x)
    grid, out, q = quantizer.qparams(x), quantizer(x), quantizer.integers(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()
    shape = (-1, 1, 1) if grid.axis is not None else ()
    torch.testing.assert_close((q - grid.zero_point.view(shape)) * grid.scale.view(shape), out, rtol=0, atol=0)
    assert q.min() >= grid.qmin
    assert q.max() <= grid.qmax
    assert grid.qmax - grid.qmin < 2**quantizer.bits
    assert torch.equal(q, q.round())
    assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros_like(x))


def test_in_range_error_is_half_a_step(quantizer):
    x = sample()
    quantizer.observe(x)
    grid = quantizer.qparams(x)
    shape = (-1, 1, 1) if grid.axis is not None else ()
    scale, zero = grid.scale.view(shape), grid.zero_point.view(shape)
    inside = x.clamp((grid.qmin - zero) * scale, (grid.qmax - zero) * scale)
    assert ((quantizer(x) - inside).abs() <= scale * (0.5 + 1e-2)).all()


def test_a_rebuilt_quantizer_goes_on_exactly(quantizer):
    quantizer.observe(sample())
    again = rebuild(quantizer.describe())
    again.load_state_dict(quantizer.state_dict())
    for _ in range(2):
        x = sample()
        quantizer.observe(x)
        again.observe(x)
        assert torch.equal(quantizer(x), again(x))


def test_it_observes_only_when_told(quantizer):
    quantizer.observe(sample())
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for training in (True, False):
        quantizer.train(training)(100 * sample())
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.freeze()
    quantizer.observe(100 * sample())
    assert torch.equal(before["scale"], quantizer.scale)


def test_without_a_range_it_says_what_to_run(quantizer):
    with pytest.raises(MicronetError, match="calibrate"):
        quantizer(sample())


def test_its_input_is_not_changed(quantizer):
    x = sample()
    kept = x.clone()
    quantizer.observe(x)
    quantizer(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_torchs_own_fake_quantize_for_power_of_two_scales(axis, zero_point):
    x = torch.randn(4, 6, 3) * 20
    channels = 1 if axis is None else x.shape[axis]
    scale = 2.0 ** -torch.arange(channels).float()
    zero = torch.full((channels,), float(zero_point))
    grid = QParams(scale, zero, -8, 7, axis) if axis is not None else QParams(scale[0], zero[0], -8, 7, None)
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(x, float(scale[0]), zero_point, -8, 7)
    else:
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero.to(torch.int32), axis, -8, 7)
    assert torch.equal(fake_quantize(x, grid), expected)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_is_one_inside_and_zero_outside(axis):
    x = torch.linspace(-3.01, 3.01, 4000).view(4, 1000).requires_grad_()
    scale = torch.tensor([0.1, 0.2, 0.05, 0.4]) if axis == 0 else torch.tensor(0.1)
    zero = torch.zeros_like(scale)
    upstream = torch.randn(4, 1000)
    fake_quantize(x, QParams(scale, zero, -8, 7, axis)).backward(upstream)
    steps = x.detach().numpy() / (scale.numpy()[:, None] if axis == 0 else scale.numpy())
    rounded = np.round(steps)
    expected = upstream.numpy() * ((rounded >= -8) & (rounded <= 7))
    np.testing.assert_array_equal(x.grad.numpy(), expected)


def test_a_weights_range_can_shrink():
    observer = MinMax(None, None)
    observer(torch.tensor([-2.0, 4.0]))
    observer(torch.tensor([-1.0, 2.0]))
    assert (float(observer.low), float(observer.high)) == (-1, 2)


def test_a_moving_average_moves_a_tenth_and_survives_a_reload():
    observer = MovingAverage(None, None)
    observer(torch.tensor([-2.0, 4.0]))
    again = MovingAverage(None, None)
    again.load_state_dict(observer.state_dict())
    again(torch.tensor([0.0, 14.0]))
    torch.testing.assert_close(again.high, torch.tensor(5.0))
    torch.testing.assert_close(again.low, torch.tensor(-1.8))


@pytest.mark.parametrize("config", [{"w_bits": 1}, {"a_bits": 33}, {"w_bits": 32, "a_bits": 32}, {"q_type": "both"}])
def test_impossible_configs_are_one_clear_error(config):
    with pytest.raises(MicronetError, match=r"allowed|lower one"):
        QuantConfig(**config)


def test_the_defaults_are_the_table():
    assert QuantConfig().to_json() == {
        "method": "iao", "w_bits": 8, "a_bits": 8, "q_type": "sym", "q_level": "channel",
        "weight_observer": "minmax", "a_sign": "auto", "first_last": "8bit",
    }  # fmt: skip
