"""The laws of quantizers, over every registered scheme."""

import numpy as np
import pytest
import torch
from torch import nn

from micronet import registry
from micronet.errors import MicronetError
from micronet.quantization.config import QuantConfig
from micronet.quantization.functional import QParams, fake_quantize, learned_step, sign, to_integers
from micronet.quantization.quantizer import rebuild
from micronet.quantization.schemes.dorefa import TanhQuantizer
from micronet.quantization.schemes.iao import Observer
from micronet.quantization.schemes.wbwtab import BinaryQuantizer, TernaryQuantizer
from micronet.training.config import TrainConfig
from micronet.training.step import SCALE_LR_FACTOR, make_optimizer

STES = ("ste", "saturate", "soft")

NUMBERS = [
    (method, bits, q_type, q_level, slot)
    for method in ("iao", "dorefa", "lsq")
    for bits in (2, 4, 8, 16)
    for q_type in (("sym", "asym") if method == "iao" else ("sym",))
    for q_level in ("channel", "layer")
    for slot in ("weight", "activation", "non-negative")
    if q_level == "channel" or slot == "weight"
]
LEVELS = [
    *[("wbwtab", bits, ste, alpha, "weight") for bits in ("binary", "ternary") for ste in STES for alpha in (0, 1)],
    *[("wbwtab", "binary", ste, 1, "activation") for ste in STES],
]


def make(case):
    method, bits, third, fourth, slot = case
    scheme = registry.resolve(registry.SCHEMES, method, "method")
    if method == "wbwtab":
        if slot == "weight":
            config = QuantConfig(w_bits=bits, w_ste=third, no_alpha=not fourth)
        else:
            config = QuantConfig(a_bits=bits, a_ste=third)
    else:
        config = QuantConfig(method=method, w_bits=bits, a_bits=bits, q_type=third, q_level=fourth)
    if slot == "weight":
        return scheme.weight_quantizer(config, bits, *((None, None) if fourth == "layer" else (0, 6)))
    return scheme.activation_quantizer(config, bits, signed=slot != "non-negative")


@pytest.fixture(params=NUMBERS + LEVELS, ids=lambda case: "-".join(map(str, case)))
def quantizer(request):
    return make(request.param)


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
    assert torch.equal(q, q.round())
    step = 2 if quantizer.scheme in ("dorefa-weight", "binary", "sign") else 1  # their integers are odd
    assert (grid.qmax - grid.qmin) // step < 2**quantizer.bits
    assert step == 1 or (q % 2 == 1).all()
    if step == 1:
        assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("case", [case for case in NUMBERS if case[0] != "dorefa" or case[4] != "weight"], ids=str)
def test_in_range_error_is_half_a_step(case):
    quantizer, x = make(case), sample()
    quantizer.observe(x)
    grid = quantizer.qparams(x)
    shape = (-1, 1, 1) if grid.axis is not None else ()
    scale, zero = grid.scale.view(shape), grid.zero_point.view(shape)
    inside = x.clamp((grid.qmin - zero) * scale, (grid.qmax - zero) * scale)
    assert ((quantizer(x) - inside).abs() <= scale * (0.5 + 1e-2)).all()


def test_a_rebuilt_quantizer_goes_on_exactly(quantizer):
    quantizer.observe(sample())
    again = rebuild(quantizer.describe(), sample())
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
    grid = quantizer.qparams(sample())
    quantizer.freeze()
    quantizer.observe(100 * sample())
    if quantizer.ranged:
        assert torch.equal(grid.scale, quantizer.qparams(sample()).scale)


@pytest.mark.parametrize("case", [case for case in NUMBERS if case[0] != "dorefa"], ids=str)
def test_without_a_range_it_says_what_to_run(case):
    quantizer = make(case)
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
    observer = Observer(None, None, averaging=False)
    observer(torch.tensor([-2.0, 4.0]))
    observer(torch.tensor([-1.0, 2.0]))
    assert (float(observer.low), float(observer.high)) == (-1, 2)


def test_a_moving_average_moves_a_tenth_and_survives_a_reload():
    observer = Observer(None, None, averaging=True)
    observer(torch.tensor([-2.0, 4.0]))
    again = Observer(None, None, averaging=True)
    again.load_state_dict(observer.state_dict())
    again(torch.tensor([0.0, 14.0]))
    torch.testing.assert_close(again.high, torch.tensor(5.0))
    torch.testing.assert_close(again.low, torch.tensor(-1.8))


@pytest.mark.parametrize(
    "config",
    [
        {"w_bits": 1},
        {"a_bits": 33},
        {"w_bits": 32, "a_bits": 32},
        {"q_type": "both"},
        {"a_bits": "ternary"},
        {"w_bits": "nary"},
        {"w_bits": 8.5},
        {"a_gain": 0},
    ],
)
def test_impossible_configs_are_one_clear_error(config):
    with pytest.raises(MicronetError, match=r"allowed|lower at least one|expected"):
        QuantConfig(**config)


def test_the_defaults_are_the_table():
    assert QuantConfig().to_json() == {
        "method": "iao", "w_bits": 8, "a_bits": 8, "q_type": "auto", "q_level": "channel",
        "weight_observer": "minmax", "a_sign": "auto", "first_last": "auto", "a_gain": 0.1, "a_ste": "saturate",
        "w_ste": "ste", "w_center": False, "no_alpha": False, "bn_fuse": False, "include": None, "exclude": None,
        "keep_8bit": None, "float_outputs": False,
    }  # fmt: skip


@pytest.mark.parametrize("axis", [None, 0])
def test_a_learned_steps_gradient_is_the_papers(axis):
    """Esser et al. 2020, equations 2 and 3, in NumPy."""
    x = (3 * torch.randn(4, 50)).requires_grad_()
    scale = (torch.rand(4) + 0.2 if axis == 0 else torch.tensor(0.3)).requires_grad_()
    upstream = torch.randn(4, 50)
    learned_step(x, QParams(scale, torch.zeros_like(scale), -7, 7, axis), 0.25).backward(upstream)
    step = scale.detach().numpy()[:, None] if axis == 0 else scale.detach().numpy()
    v, g = x.detach().numpy() / step, upstream.numpy()
    q = np.clip(np.round(v), -7, 7)
    inside = (v > -7) & (v < 7)
    slope = g * np.where(inside, q - v, q) * 0.25
    np.testing.assert_array_equal(x.grad.numpy(), g * inside)
    expected = slope.sum(1) if axis == 0 else slope.sum()
    np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ste", STES)
def test_a_signs_gradient_and_its_value_at_zero(ste):
    x = torch.tensor([-2.0, -1.0, -0.4, -0.0, 0.0, 0.4, 1.0, 2.0]).requires_grad_()
    out = sign(x, ste)
    assert out.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    out.backward(torch.full((8,), 2.0))
    values = x.detach().numpy()
    slope = {"ste": np.ones(8), "saturate": np.abs(values) <= 1, "soft": np.maximum(0, 1 - np.abs(values))}[ste]
    np.testing.assert_allclose(x.grad.numpy(), 2 * slope)


def numpy_gradient(function, w, upstream):
    """Differentiate sum(upstream * function(w)) by central differences, in float64."""
    gradient = np.zeros_like(w)
    for index in np.ndindex(w.shape):
        ends = []
        for move in (1e-6, -1e-6):
            moved = w.copy()
            moved[index] += move
            ends.append((upstream * function(moved)).sum())
        gradient[index] = (ends[0] - ends[1]) / 2e-6
    return gradient


def test_a_binary_weights_gradient_goes_through_alpha_and_the_signs():
    w = torch.randn(3, 4, 2).double()
    upstream = torch.randn(3, 4, 2).double()
    x = w.clone().requires_grad_()
    BinaryQuantizer(0, 3, True, "ste")(x).backward(upstream)
    levels = np.where(w.numpy() - w.numpy().mean(1, keepdims=True) >= 0, 1.0, -1.0)

    def alpha(v):
        return np.abs(v - v.mean(1, keepdims=True)).mean((1, 2), keepdims=True)

    through_alpha = numpy_gradient(lambda v: alpha(v) * levels, w.numpy(), upstream.numpy())
    through_signs = alpha(w.numpy()) * upstream.numpy()
    through_signs -= through_signs.mean(1, keepdims=True)  # the centring's
    np.testing.assert_allclose(x.grad.numpy(), through_alpha + through_signs, atol=1e-6)


def test_a_ternary_weights_gradient_goes_through_alpha_and_the_levels():
    w = torch.randn(3, 4, 2).double()
    upstream = torch.randn(3, 4, 2).double()
    x = w.clone().requires_grad_()
    TernaryQuantizer(0, 3, True, "ste")(x).backward(upstream)
    size = np.abs(w.numpy())
    used = size > 0.7 * size.mean((1, 2), keepdims=True)
    levels = np.sign(w.numpy()) * used

    def alpha(v):
        return (np.abs(v) * used).sum((1, 2), keepdims=True) / used.sum((1, 2), keepdims=True)

    through_alpha = numpy_gradient(lambda v: alpha(v) * levels, w.numpy(), upstream.numpy())
    np.testing.assert_allclose(x.grad.numpy(), through_alpha + alpha(w.numpy()) * upstream.numpy(), atol=1e-6)


def test_a_ternary_weight_on_the_threshold_is_zero_and_out_of_alpha():
    w = torch.tensor([[1.0, 1.0, 1.0, 0.7, 0.0, 0.0, 4.0, -0.3]])  # mean magnitude 1, threshold 0.7
    quantizer = TernaryQuantizer(0, 1, True, "ste")
    assert quantizer.integers(w).tolist() == [[1, 1, 1, 0, 0, 0, 1, 0]]
    torch.testing.assert_close(quantizer.qparams(w).scale, torch.tensor([7 / 4]))


def test_a_dorefa_weights_gradient_is_tanhs():
    w = torch.randn(5, 4).double()
    upstream = torch.randn(5, 4).double()
    x = w.clone().requires_grad_()
    TanhQuantizer(3)(x).backward(upstream)
    np.testing.assert_allclose(x.grad.numpy(), upstream.numpy() * (1 - np.tanh(w.numpy()) ** 2), rtol=1e-12)


def test_a_dorefa_weight_is_the_papers_times_its_magnitude():
    """Zhou et al. 2016, equation 9: 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1."""
    w = torch.randn(6, 5).double()
    t = np.tanh(w.numpy())
    n = 2**4 - 1
    unit = 2 * np.round((t / (2 * np.abs(t).max()) + 0.5) * n) / n - 1
    np.testing.assert_allclose(TanhQuantizer(4)(w).detach().numpy(), unit * np.abs(t).max(), rtol=1e-6)


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
def test_depthwise_weights_of_few_levels_are_not_all_zero(kind):
    w = torch.randn(6, 1, 3, 3)
    out = kind(0, 6, True, "ste")(w)
    assert (out.flatten(1).abs().amax(1) > 0).all()


def test_a_learned_steps_gradient_is_summed_in_32_bits_in_mixed_precision():
    """All products are small integers, so their sums in float32 are exact; above 256, sums in bfloat16 are not."""
    x, upstream = torch.randint(-9, 10, (2, 40, 50)).to(torch.bfloat16)
    scale = torch.tensor(1.0, requires_grad=True)
    learned_step(x.requires_grad_(), QParams(scale, torch.tensor(0.0), -7, 7, None), 1.0).backward(upstream)
    slope = torch.where(x.abs() <= 7, 0, x.clamp(-7, 7))
    assert float(scale.grad) == float((slope * upstream).detach().double().sum())


@pytest.mark.parametrize("zero_point", [0.0, 3.0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_done_in_pieces_are_what_they_are_in_one(memory_format, zero_point):
    x = (5 * torch.randn(40, 16, 32, 32)).contiguous(memory_format=memory_format)
    scale = torch.tensor(0.3, requires_grad=True)
    grid = QParams(scale.detach(), torch.tensor(zero_point), -8, 7, None)
    out = fake_quantize(x, grid)
    assert torch.equal(out, (to_integers(x, grid) - zero_point) * grid.scale)
    assert out.is_contiguous(memory_format=memory_format)
    upstream = torch.randn_like(x)
    x.requires_grad_()
    learned_step(x, QParams(scale, torch.tensor(0.0), -8, 7, None), 1.0).backward(upstream)
    v = x.detach() / 0.3
    inside = (v > -8) & (v < 7)
    torch.testing.assert_close(x.grad, upstream * inside)
    slope = torch.where(inside, v.round().clamp(-8, 7) - v, v.round().clamp(-8, 7)).double() * upstream
    torch.testing.assert_close(scale.grad, slope.sum().float(), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("q_type", ["sym", "asym"])
def test_equals_torchs_own_fake_quantize_but_on_ties(axis, q_type):
    """torch multiplies by 1 / scale where ONNX and we divide, so the two may differ next to a half step alone."""
    scheme = registry.resolve(registry.SCHEMES, "iao", "method")
    quantizer = scheme.weight_quantizer(QuantConfig(q_type=q_type), 8, axis, None if axis is None else 6)
    x = torch.randn(6, 4000) * torch.rand(6, 1)
    quantizer.observe(x)
    grid = quantizer.qparams(x)
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(
            x, float(grid.scale), int(grid.zero_point), grid.qmin, grid.qmax
        )
        steps = x / grid.scale
    else:
        zero = grid.zero_point.to(torch.int32)
        expected = torch.fake_quantize_per_channel_affine(x, grid.scale, zero, 0, grid.qmin, grid.qmax)
        steps = x / grid.scale.view(-1, 1)
    far = ((steps - steps.floor()) - 0.5).abs() >= 1e-5
    assert far.float().mean() > 0.99
    assert torch.equal(quantizer(x)[far], expected[far])


def test_learned_scales_are_never_decayed_and_learn_faster():
    model = nn.Sequential(nn.Linear(4, 4), registry.resolve(registry.QUANTIZERS, "lsq", "quantizer")(4, True, False))
    for name in ("adam", "muon"):
        groups = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.1)).param_groups
        found = {
            each: (group["weight_decay"], group.get("lr_factor", 1)) for group in groups for each in group["params"]
        }
        assert found.pop(model[1].log_scale) == (0, SCALE_LR_FACTOR)
        assert set(found.values()) == {(0.1, 1)}
