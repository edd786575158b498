"""What went wrong once on networks and data of all kinds, and must not again."""

import statistics

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.artifact.artifact import Artifact
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx
from micronet.quantization.calibrate import calibrate, each_quantizer, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.equalize import equalize
from micronet.quantization.fold import fold_model
from micronet.quantization.functional import dequantize, int8_grid, integer_range, to_integers
from micronet.quantization.histogram import GridSpec, Histogram, find_range
from micronet.quantization.quantize import quantize_model
from micronet.quantization.recovery import correct_biases, reestimate_norms
from micronet.quantization.schemes.iao import AffineQuantizer
from micronet.quantization.schemes.lsq import LearnedQuantizer
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import EXACT_INT8, OrtPredictor

IMAGES = torch.randn(16, 3, 12, 12)


def decibels(reference, found):
    reference, found = reference.detach(), found.detach()
    return float(10 * torch.log10(reference.square().sum() / (found - reference).square().sum().clamp(min=1e-30)))


def of_most_images(reference, found):
    """The median image's signal to noise: one value at a tie may go the other way on another CPU, and few bits show."""
    return statistics.median(decibels(*pair) for pair in zip(reference, found, strict=True))


def chain_of_norms():
    layers, channels = [], 3
    for width in (16, 16, 16):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.Conv2d(channels, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    for _ in range(20):
        model.train()(torch.randn(32, 3, 12, 12))
    return model.eval()


class Norms(nn.Module):
    """Batch norms behind a convolution, one that others read, a ReLU, a concatenation, and the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.folded, self.first, self.shared, self.relu_norm = (nn.BatchNorm2d(3) for _ in range(4))
        self.relu, self.joined = nn.ReLU(), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.read(self.folded(self.conv(self.first(x))))
        z = self.relu_norm(self.relu(self.shared(y)))
        return self.joined(torch.cat([y, z], 1))


def test_batch_norms_that_cannot_be_folded_are_named_with_the_reason():
    _, record = fold_model(Norms().eval())
    assert record.result["pairs"] == [["conv", "folded"]]
    assert record.result["left"] == {
        "first": "it follows an input", "shared": "others read the output of read too",
        "relu_norm": "it follows ReLU relu", "joined": "it follows cat()",
    }  # fmt: skip


@pytest.mark.parametrize("q_type", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_grids_hold_the_same_values(bits, q_type):
    weight = torch.randn(6, 30)
    quantizer = AffineQuantizer(bits, q_type == "sym", True, True, "minmax", 0, 6)
    quantizer.observe(weight)
    grid, wide = quantizer.qparams(weight), int8_grid(quantizer.qparams(weight))
    assert torch.equal(dequantize(to_integers(quantizer(weight), wide), wide), quantizer(weight))
    assert wide.qmin >= -127
    assert 32 < wide.qmax <= (127 if bits == 8 else 64)  # beyond 64 the sums of x86 without VNNI saturate
    assert (wide.scale <= grid.scale).all()


@pytest.mark.parametrize("config", [
    {"method": "lsq", "w_bits": 2, "a_bits": 2}, {"w_bits": 2, "a_bits": 2, "q_type": "asym"},
    {"w_bits": 4, "a_bits": 4}, {"method": "dorefa", "w_bits": 3, "a_bits": 4}, {"w_bits": "ternary", "a_bits": 4},
], ids=str)  # fmt: skip
def test_bn_fuse_and_the_file_keep_few_bits_as_they_are(config, tmp_path):
    model, record = quantize_model(chain_of_norms(), QuantConfig(**config, first_last="same"))
    calibrate(model, [IMAGES])
    model.eval()
    exact, _ = fold_model(model)
    assert of_most_images(model(IMAGES), exact(IMAGES)) > 100
    folded, fold_record = fold_model(model, [record])
    for name, source in record.result["inputs"].items():
        owner, _, slot = source.rpartition(".")
        layer, unsnapped = folded.get_submodule(name), exact.get_submodule(name)
        step = getattr(folded.get_submodule(owner), slot).qparams(layer.weight).scale
        largest = layer.weight.detach().flatten(1).abs().amax(1)
        # Half a unit, of which the largest weight has more than 32; with the bare integers' unit 1 to 7.
        assert ((layer.bias - unsnapped.bias).abs() <= step * largest / 64).all()
    artifact = Artifact(folded, ModelSpec("chain", {}), [record, fold_record])
    onnx.save(to_onnx(artifact, IMAGES), tmp_path / "a.onnx")
    scores = OrtPredictor(tmp_path / "a.onnx", RuntimeOptions())(IMAGES.numpy())
    assert of_most_images(folded(IMAGES), torch.from_numpy(scores)) > 100


def test_eight_learned_bits_are_all_used():
    weight = torch.randn(8, 200)
    quantizer = LearnedQuantizer(8, True, True, 0, 8)
    quantizer.observe(weight)
    assert quantizer.integers(weight).abs().amax(1).min() == 127
    few = LearnedQuantizer(2, True, True)
    few.observe(weight)
    torch.testing.assert_close(few.qparams(weight).scale, 2 * weight.abs().mean())  # qmax is 1; as in the paper


class InPlaceAlias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.r, self.b, self.f = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        y = self.a(x)
        return self.f(self.b(self.r(y)).mean((2, 3)) + y.mean((2, 3)))


def test_a_sign_takes_no_place_of_a_relu_whose_input_is_read_again():
    with pytest.raises(MicronetError, match="modifies in place a tensor that is used again"):
        quantize_model(InPlaceAlias(), QuantConfig(w_bits=32, a_bits="binary", include="b", first_last="same"))


def test_signs_behind_an_average_over_channels_are_not_fused_as_if_beside_one():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.pool, self.c, self.last = nn.AvgPool1d(2), nn.Conv1d(144, 6, 1), nn.Linear(24, 3)

        def forward(self, x):
            x = self.pool(self.bn(self.stem(x)).flatten(2).transpose(1, 2))
            return self.last(self.c(x).flatten(1))

    network = Mixed().eval()
    nn.init.uniform_(network.bn.running_var, 0.1, 9)
    nn.init.normal_(network.bn.weight)
    model, record = quantize_model(network, QuantConfig(w_bits=32, a_bits="binary"))
    calibrate(model, [IMAGES])
    folded, _ = fold_model(model.eval(), [record])
    assert decibels(model(IMAGES), folded(IMAGES)) > 60


def test_equalization_leaves_a_mean_over_features_alone():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = F.relu(self.a(x)).mean(2)
            return self.d(F.relu(self.c(self.b(y))))

    model, x = Features(), torch.randn(4, 5, 6)
    before = model(x)
    equalize(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_histogram_counts_more_than_float32_can():
    histogram = Histogram()
    histogram.add(torch.zeros(1).expand(20_000_000))
    assert float(histogram.counts.sum()) == 20_000_000


@pytest.mark.parametrize("calibrator", ["mse", "entropy"])
def test_one_far_value_does_not_cost_the_other_end(calibrator):
    histogram = Histogram()
    histogram.add(torch.cat([torch.rand(100_000), torch.tensor([-8.0])]))
    low, high = find_range(histogram, GridSpec(0, 15, symmetric=False), calibrator, 99.99)
    assert high > 0.9
    assert low > -2 or calibrator == "entropy"  # which counts a value's share, not its error


def test_recovery_counts_images_not_batches():
    floating = chain_of_norms()
    found = []
    for sizes in ([64, 64, 64, 64], [192, 64]):
        torch.manual_seed(3)
        batches = list(torch.randn(256, 3, 12, 12).split(sizes))
        model, _ = quantize_model(floating, QuantConfig(w_bits=3, a_bits=32))
        calibrate(model, batches)
        correct_biases(floating, model, batches)
        found.append(model.eval()(IMAGES))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_norms_estimated_anew_are_not_corrected_again():
    floating = chain_of_norms()
    model, _ = quantize_model(floating, QuantConfig(w_bits=3, a_bits=8))
    calibrate(model, [IMAGES])
    reestimate_norms(model, [IMAGES])
    means = [module.running_mean.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert correct_biases(floating, model, [IMAGES], norms_estimated=True) == 1  # the last layer has no norm
    after = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(map(torch.equal, means, after))
    with pytest.raises(MicronetError, match="at least two images"):
        reestimate_norms(model, [IMAGES[:1]])
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_infinity_in_a_users_loop_ends_in_a_line():
    model, _ = quantize_model(chain_of_norms(), QuantConfig())
    calibrate(model, [IMAGES])
    bad = IMAGES.clone()
    bad[0, 0, 0, 0] = torch.inf
    with pytest.raises(MicronetError, match="NaN or infinity reached"), observing(model):
        model(bad)


@pytest.mark.parametrize("config", [{}, {"q_type": "asym"}, {"method": "lsq"}, {"method": "dorefa"}], ids=str)
def test_a_network_called_twice_in_a_step_trains(config):
    model, _ = quantize_model(chain_of_norms(), QuantConfig(**config))
    calibrate(model, [IMAGES])
    with observing(model.train()):
        (model(IMAGES) + model(0.5 * IMAGES)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("config", [{}, {"method": "lsq"}, {"a_sign": "signed"}, {"w_bits": "ternary"}], ids=str)
def test_grouped_transposed_convolutions_fuse_and_export(config, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 6, 2, 2, groups=2), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 2, 3),
    )  # fmt: skip
    quantized = micronet.quantize(model.eval(), **config).model
    micronet.calibrate(quantized, [IMAGES])
    fused = micronet.fuse(quantized.eval()).model
    assert decibels(quantized(IMAGES), fused(IMAGES)) > 40
    for name, network in (("q.onnx", quantized), ("f.onnx", fused)):
        micronet.export_onnx(network, IMAGES, output=tmp_path / name)
        scores = OrtPredictor(tmp_path / name, RuntimeOptions())(IMAGES.numpy())
        assert decibels(network(IMAGES), torch.from_numpy(scores)) > 30


@pytest.mark.parametrize("method", ["iao", "lsq"])
def test_other_dtypes_calibrate_and_train(method):
    model, _ = quantize_model(chain_of_norms(), QuantConfig(method=method))
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(model, [IMAGES])
        with observing(model.train()):
            model(IMAGES).float().square().mean().backward()
    double, _ = quantize_model(chain_of_norms().double(), QuantConfig(method=method))
    calibrate(double, [IMAGES.double()])
    with observing(double):
        assert double(IMAGES.double()).dtype == torch.float64


def test_two_outputs_export(tmp_path):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.classes = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = F.relu(self.body(x))
            return self.boxes(x), self.classes(x)

    quantized = micronet.quantize(Detector()).model
    micronet.calibrate(quantized, [IMAGES])
    micronet.export_onnx(quantized.eval(), IMAGES, output=tmp_path / "d.onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_INT8, "1")
    found = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"), options).run(None, {"images": IMAGES.numpy()})
    for wanted, have in zip(quantized(IMAGES), found, strict=True):
        assert decibels(wanted, torch.from_numpy(have)) > 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"w_ste": "soft"}, "w-ste soft only applies to"),
        ({"no_alpha": True}, "no-alpha only applies to"),
        ({"a_ste": "soft", "w_bits": "binary"}, "a-ste soft only applies to"),
        ({"method": "lsq", "weight_observer": "moving-average"}, "weight-observer moving-average only applies to"),
        ({"include": "0", "exclude": "0"}, "leave no layers"),
    ],
)
def test_options_without_use_are_refused(config, message):
    with pytest.raises(MicronetError, match=message):
        quantize_model(chain_of_norms(), QuantConfig(**config))


@pytest.mark.parametrize(
    "options",
    [
        ["--percentile", 99], ["--mode", "qat", "--adaround"], ["--dry-run", "--target-drop", 1],
        ["--mode", "ptq", "--method", "dorefa", "--calibrator", "mse"],
    ],
    ids=str,
)  # fmt: skip
def test_commands_refuse_options_without_use(micronet, chain, tmp_path, options):
    done = micronet("quantize", chain / "float.safetensors", *options, "-o", tmp_path / "a.safetensors")
    assert done.code == 2
    assert "drop" in done.err


def test_a_cache_of_other_images_is_refused(micronet, chain, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    start = ["quantize", chain / "float.safetensors", "--mode", "ptq", "--calib-data", folder, "--calib-cache"]
    for number, code in enumerate((0, 2)):
        Image.new("L", (32, 32), 90 * number).save(folder / "a.png")
        done = micronet(*start, tmp_path / "cache", "-o", tmp_path / f"{number}.safetensors")
        assert done.code == code, done.err
    assert "different images" in done.err


def test_target_drop_works_beside_signs(micronet, chain, tmp_path):
    done = micronet(
        "quantize", chain / "float.safetensors", "--a-bits", "binary", "--mode", "ptq", "--target-drop", 100,
        "-o", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert done.code == 0, done.err


def test_every_observer_stays_where_it_was_told_while_frozen():
    model, _ = quantize_model(chain_of_norms(), QuantConfig())
    calibrate(model, [IMAGES])
    before = [q.scale.clone() for _, _, q in each_quantizer(model)]
    model(10 * IMAGES)
    assert all(map(torch.equal, before, [q.scale for _, _, q in each_quantizer(model)]))
    assert integer_range(4, signed=True, narrow=True) == (-7, 7)


def test_the_entropy_calibrator_does_not_clip_a_handful_of_values_to_next_to_nothing():
    torch.manual_seed(0)
    histogram = Histogram()
    histogram.add(torch.randn(160))
    for grid in (GridSpec(-128, 127, True), GridSpec(0, 255, False)):
        low, high = find_range(histogram, grid, "entropy", 99.99)
        assert high - low > 0.2 * (histogram.high - histogram.low)


def test_the_entropy_calibrator_does_not_clip_all_where_no_value_is_near_zero():
    histogram = Histogram()
    histogram.add(torch.cat([torch.linspace(-1, -0.5, 80), torch.linspace(0.5, 1, 80)]))
    assert find_range(histogram, GridSpec(-127, 127, True), "entropy", 99.99)[1] > 0.9
