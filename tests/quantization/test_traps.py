"""What went wrong in the micronet of 2021 and must not here; the others of the list are laws in the files beside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import load
from micronet.errors import MicronetError
from micronet.quantization.calibrate import calibrate, collect, each_quantizer, frozen, observing, set_ranges
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model, restore
from micronet.quantization.schemes.dorefa import TanhQuantizer

IMAGES = torch.randn(8, 3, 12, 12)
ALL = [
    {"method": method, "w_bits": bits, "a_bits": a_bits}
    for method, bits, a_bits in (
        ("iao", 8, 8), ("dorefa", 4, 4), ("lsq", 4, 4), ("iao", "binary", "binary"), ("iao", "ternary", 8),
    )
]  # fmt: skip


def test_t2_dorefas_zero_is_half_a_step_and_a_tensor_of_zeros_stays_finite():
    quantizer = TanhQuantizer(8)
    w = torch.tensor([0.0, 0.5, -0.25])
    assert quantizer(w)[0].abs() == quantizer.qparams(w).scale
    assert torch.isfinite(quantizer(torch.zeros(5))).all()
    assert quantizer(torch.zeros(5)).abs().max() < 1e-12


@pytest.mark.parametrize("config", ALL, ids=str)
def test_t3_evaluating_changes_no_weight_and_says_the_same_twice(config):
    model, _ = quantize_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        QuantConfig(**config),
    )
    calibrate(model, [IMAGES])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = model.eval()(IMAGES), model(IMAGES)
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("q_type", ["sym", "asym"])
@pytest.mark.parametrize("q_level", ["channel", "layer"])
@pytest.mark.parametrize("observer", ["minmax", "moving-average"])
def test_t12_t13_ranges_survive_a_reload_and_go_on_where_they_were(q_type, q_level, observer):
    config = QuantConfig(q_type=q_type, q_level=q_level, weight_observer=observer)
    model, record = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config)
    calibrate(model, [IMAGES])
    again = restore(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), record)
    again.load_state_dict(model.state_dict())
    high = model[0].input_quantizer.observer.high.clone()
    for network in (model, again):
        with observing(network):
            network.train()(0.01 * IMAGES)
    left, right = model.state_dict(), again.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    moved = again[0].input_quantizer.observer.high
    torch.testing.assert_close(moved, 0.9 * high + 0.1 * 0.01 * IMAGES.max())  # a tenth of the way, not all of it


def test_t14_data_parallel_whose_replicas_forget_their_ranges_is_refused():
    model, _ = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), QuantConfig())
    with pytest.raises(MicronetError, match="DataParallel"):
        calibrate(nn.DataParallel(model), [IMAGES])


def test_t16_a_range_of_another_shape_is_refused(tmp_path, chain):
    from micronet.artifact.artifact import load_state

    model = load(chain / "int8.safetensors").model
    tensors = dict(model.state_dict())
    name = next(name for name in tensors if name.endswith("weight_quantizer.scale"))
    tensors[name] = tensors[name][:1]
    with pytest.raises(MicronetError, match="wrong shape"):
        load_state(model, tensors, "the file")


def test_t17_ranges_are_those_of_the_stream():
    from micronet.quantization.schemes.iao import Observer

    observer = Observer(5, 0, averaging=True)
    low = high = None
    for _ in range(20):
        x = torch.randn(5, 30) * torch.rand(5, 1)
        observer(x)
        now = x.amin(1), x.amax(1)
        low = now[0] if low is None else 0.9 * low + 0.1 * now[0]
        high = now[1] if high is None else 0.9 * high + 0.1 * now[1]
    torch.testing.assert_close((observer.low, observer.high), (low, high))


@pytest.mark.parametrize("more", [[], pytest.param(["--bn-fuse"], marks=pytest.mark.slow)], ids=["plain", "bn-fuse"])
@pytest.mark.parametrize("config", ALL, ids=str)
def test_t20_t21_every_method_goes_through_every_command(micronet, lenet, tmp_path, config, more):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]
    int8, fused, onnx = (tmp_path / name for name in ("q.safetensors", "f.safetensors", "q.onnx"))
    few = ["--epochs", 1, "--limit", 160, "--device", "cpu"]
    done = micronet("quantize", lenet, *options, *more, *few, "-o", int8)
    assert done.code == 0, done.err
    assert micronet("bn-fuse", int8, "-o", fused).code == 0
    done = micronet("export-onnx", fused, "-o", onnx)
    assert done.code == 0, done.err
    rows = micronet("compare", int8, fused, onnx, "--json").json["rows"]
    assert rows[2]["size_bytes"] < 0.7 * lenet.stat().st_size
    assert abs(rows[1]["accuracy"] - rows[2]["accuracy"]) < 0.01
    assert micronet("finetune", int8, *few, "-o", tmp_path / "t.safetensors").code == 0


def test_t22_a_norm_before_its_convolution_and_a_convolution_without_one():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.alone = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.alone(self.conv(F.relu(self.bn(x)))).mean((2, 3))

    model, record = quantize_model(PreActivation(), QuantConfig())
    calibrate(model, [IMAGES])
    assert set(record.result["inputs"]) == {"conv", "alone"}
    with pytest.raises(MicronetError, match="nothing to fold"):
        fold_model(model)
    with pytest.raises(MicronetError, match="found no quantized convolution followed by a batch norm"):
        quantize_model(PreActivation(), QuantConfig(bn_fuse=True))


def test_t25_a_folded_weights_scale_is_its_largest_over_127_exactly():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.uniform_(model[1].running_var, 0.1, 4)
    folded, _ = fold_model(model.eval())
    quantized, _ = quantize_model(folded, QuantConfig())
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    set_ranges(quantized, collect(quantized.train(), [5 + IMAGES]), "percentile", 99.0)
    weight = folded[0].weight
    assert torch.equal(quantized[0].weight_quantizer.scale, weight.flatten(1).abs().amax(1) / 127)
    assert all(torch.equal(quantized.state_dict()[name], value) for name, value in before.items())


def test_t26_the_gradient_of_a_frozen_asymmetric_grid_ends_where_the_grid_does(tmp_path):
    config = QuantConfig(q_type="asym")
    model, record = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config)
    calibrate(model, [IMAGES.abs() - 0.1])
    again = restore(nn.Sequential(nn.Conv2d(3, 4, 3)), record)
    again.load_state_dict(model.state_dict())
    quantizer = again[0].input_quantizer
    grid = quantizer.qparams(IMAGES)
    lowest = (grid.qmin - 0.5 - grid.zero_point) * grid.scale
    highest = (grid.qmax + 0.5 - grid.zero_point) * grid.scale
    x = torch.linspace(float(2 * lowest), float(1.5 * highest), 1001).requires_grad_()
    with frozen(again):
        quantizer(x).sum().backward()
    inside = (x.detach() > lowest) & (x.detach() < highest)
    assert torch.equal(x.grad, inside.float())
    assert lowest > -0.3 * highest  # far from symmetric


def test_t29_an_adds_quantizers_are_unchanged_by_evaluation_and_by_frozen_training():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    model, _ = quantize_model(Add(), QuantConfig())
    calibrate(model, [IMAGES])
    before = {name: value.clone() for name, value in model.state_dict().items() if "quantizer" in name}
    model.eval()(100 * IMAGES)
    model.train()
    with frozen(model):
        model(100 * IMAGES)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("frozen"))
    assert sum(slot == "output_quantizer" for _, slot, _ in each_quantizer(model)) == 4  # a, b, their sum, c


def test_t30_pools_keep_every_argument():
    pools = nn.Sequential(
        nn.MaxPool2d(3, 2, padding=1, dilation=1, ceil_mode=True),
        nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5),
    )
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *pools, nn.Conv2d(4, 2, 1))
    quantized, _ = quantize_model(model, QuantConfig(w_bits=16, a_bits=16))
    calibrate(quantized, [IMAGES])
    for index in (1, 2):
        assert {k: v for k, v in vars(model[index]).items() if k[0] != "_"} == {
            k: v for k, v in vars(quantized[index]).items() if k[0] != "_"
        }
    torch.testing.assert_close(quantized(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


def test_t40_padding_adds_zeros_to_binary_activations():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    quantized, _ = quantize_model(model, QuantConfig(w_bits="binary", a_bits="binary"))
    calibrate(quantized, [IMAGES])
    quantized.eval()
    seen = {}
    quantized[2].register_forward_hook(lambda m, i, out: seen.update(x=i[0], out=out))
    quantized(IMAGES)
    quantizer, weight = quantized[2].weight_quantizer, quantized[2].weight
    padded = F.pad(seen["x"], (1, 1, 1, 1))
    assert set(padded.unique().tolist()) == {-1, 0, 1}
    integers = F.conv2d(padded.double(), quantizer.integers(weight).double())  # sums of -1, 0 and 1
    alpha = quantizer.qparams(weight).scale.double().view(1, -1, 1, 1)
    expected = integers * alpha + quantized[2].bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(seen["out"].double(), expected, rtol=1e-5, atol=1e-5)
