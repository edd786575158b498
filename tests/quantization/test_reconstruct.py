"""Reconstruction: parts that make up the network, outputs that come closer, grids that stay what they were."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec, build_model
from micronet.models.layers import Add
from micronet.onnx.export import to_onnx
from micronet.onnx.layer_agreement import compare_layers
from micronet.quantization import adaround, blocks, synthetic, walk
from micronet.quantization.adaround import Recorded, Unit, mixed
from micronet.quantization.calibrate import calibrate, collect, each_quantizer, set_ranges
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.weight_scales import search_weight_scales
from micronet.stages.quantize import Quantize

IMAGES = torch.randn(48, 3, 12, 12)


class Residual(nn.Module):
    """A stem, a residual block with in-place and functional operations, a chain and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norm, self.relu, self.add = nn.BatchNorm2d(8), nn.ReLU(inplace=True), Add()
        self.chain = nn.Sequential(
            nn.Conv2d(8, 12, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.second(self.relu(self.norm(self.first(x))))
        x = (x + y).relu_()
        return self.head(self.chain(x).relu().mean((2, 3)))


class Untraceable(Residual):
    def forward(self, x):
        return super().forward(x if bool(torch.isin(x, IMAGES).all()) else 2 * x)


class Pair(Residual):
    def forward(self, x):
        out = super().forward(x)
        return out, out.softmax(1)


def floating(kind=Residual):
    torch.manual_seed(0)
    return kind().eval()


def quantized(model, **config):
    made, _ = quantize_model(model, QuantConfig(**{"w_bits": 3, "a_bits": 4, "first_last": "same", **config}))
    set_ranges(made, collect(made, [IMAGES]), "minmax", 100.0)
    return made.eval()


def error(model, other):
    with torch.no_grad():
        return float((model(IMAGES) - other(IMAGES)).norm() / other(IMAGES).norm())


@pytest.mark.parametrize("kind", [Residual, Untraceable, Pair, "resnet18", "nin_gc"])
@torch.no_grad()
def test_the_parts_one_after_the_other_are_the_network(kind):
    model = build_model(ModelSpec(kind, {"width": 0.1})).eval() if isinstance(kind, str) else floating(kind)
    images = torch.randn(3, 3, 32, 32)
    made, record = quantize_model(model, QuantConfig(w_bits=4, a_bits=4))
    calibrate(made, [images])
    parts, _ = walk.parts_of(model, made.eval(), [images], "x")
    left, right = images, images
    for part in parts:
        left, right = part.floating(left.clone()), part.quantized(right.clone())
    assert all(map(torch.equal, left, model(images)))
    assert all(map(torch.equal, right, made(images)))
    assert sorted(name for part in parts for name in part.layers) == sorted(record.result["inputs"])


def test_blocks_are_residual_blocks_and_short_chains():
    model = floating()
    parts, _ = walk.parts_of(model, quantized(model), [IMAGES], "x")
    chain = ["chain.0", "chain.3", "chain.5"]
    assert [part.layers for part in parts] == [["stem"], ["first", "second"], chain, ["head"]]
    assert all(part.is_block for part in parts)


def test_blocks_come_closer_than_the_nearest_levels_and_the_grids_stay(monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 40)
    monkeypatch.setattr(adaround, "LEARNING_RATE", 0.1)
    model = floating()
    made = quantized(model)
    before = copy.deepcopy(made)
    done = reconstruct(model, made, [IMAGES], "block")
    assert (done.layers, done.blocks, done.alone, done.images) == (7, 4, (), 48)
    assert error(made, model) < 0.9 * error(before, model)
    found, known = list(each_quantizer(made)), list(each_quantizer(before))
    assert [(*item[:2], item[2].describe()) for item in found] == [(*item[:2], item[2].describe()) for item in known]
    for (name, slot, quantizer), (_, _, old) in zip(found, known, strict=True):
        if slot != "weight_quantizer":
            assert quantizer.scale != old.scale  # it was learned
            continue
        layer, weight = made.get_submodule(name), before.get_submodule(name).weight
        assert quantizer.frozen
        assert torch.equal(quantizer.scale, old.scale)
        torch.testing.assert_close(quantizer(layer.weight), layer.weight.detach(), rtol=1e-6, atol=1e-8)
        scale = quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
        assert ((layer.weight - weight).abs() / scale).max() <= 1 + 1e-4  # up or down, never farther


def test_layers_of_a_traced_network_learn_what_those_of_an_untraceable_one_do(monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 10)
    weights = []
    for kind in (Residual, Untraceable):
        model = floating(kind)
        made = quantized(floating(), a_bits=32)  # of an untraceable one, other activations would be quantized
        made = made if kind is Residual else forced(made)
        assert reconstruct(model, made, [IMAGES], "layer").layers == 7
        weights.append({name: value for name, value in made.state_dict().items() if name.endswith("weight")})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def forced(model):
    model.__class__ = Untraceable
    return model


def test_what_is_in_no_block_is_learned_layer_by_layer_and_named(monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 5)
    model = floating(Untraceable)
    done = reconstruct(model, quantized(model), [IMAGES], "block")
    assert (done.blocks, len(done.alone)) == (0, 7)
    assert "learned one by one: stem, first" in str(done)
    monkeypatch.setattr(blocks, "LARGEST", 2)
    model = floating()
    assert reconstruct(model, quantized(model), [IMAGES], "block").alone == ("chain.0", "chain.3", "chain.5")


def test_fewer_images_are_used_where_all_would_not_fit(monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 2)
    monkeypatch.setattr(walk, "MEMORY", walk.KEPT * 10 * 4 * 8 * 12 * 12)  # ten images of the largest tensor, float32
    model = floating()
    assert reconstruct(model, quantized(model), [IMAGES], "block").images == 10


def test_images_need_not_be_on_the_first_axis(monkeypatch):
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.second(self.first(x.flatten(2).permute(2, 0, 1)).mean(0))

    monkeypatch.setattr(adaround, "STEPS", 2)
    monkeypatch.setattr(walk, "BATCH", 32)
    model = Columns().eval()
    made = quantized(model)
    assert search_weight_scales(model, made, [IMAGES]) == 2
    assert reconstruct(model, made, [IMAGES], "layer").layers == 2


def test_about_half_of_the_values_are_dropped_and_a_seed_repeats_them():
    ones, zeros = torch.ones(1000), torch.zeros(1000)
    drawn = [mixed(ones, zeros, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(abs(values.sum() - 500) < 5 * 250**0.5 for values in drawn)  # five standard deviations, sqrt(n p q)


@pytest.mark.parametrize("config", [{"a_sign": "signed"}, {"q_type": "asym"}, {}])
def test_a_learned_scale_is_the_quantizers_and_its_zero_point_stays(config):
    quantizer = quantized(floating(), **config).stem.input_quantizer
    before = quantizer.qparams(IMAGES)
    dropping = adaround._Dropping(quantizer, torch.Generator())
    with torch.no_grad():
        dropping.log_scale += 0.1
    dropping.keep()
    after = quantizer.qparams(IMAGES)
    torch.testing.assert_close(after.scale, before.scale * torch.tensor(0.1).exp())
    assert torch.equal(after.zero_point, before.zero_point)


@pytest.mark.parametrize("level", ["channel", "layer"])
@torch.no_grad()
def test_no_weight_scale_has_a_larger_output_error_than_the_largest_weights(level):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(800, 5))
    made = quantized(model, q_level=level)
    before = copy.deepcopy(made)
    assert search_weight_scales(model, made, [IMAGES]) == 3
    squared = [(network[0](IMAGES) - model[0](IMAGES)).square() for network in (made, before)]
    for layer, old in zip((made[0], made[2], made[4]), (before[0], before[2], before[4]), strict=True):
        shares = layer.weight_quantizer.scale / old.weight_quantizer.scale
        assert (shares < 1).any()
        torch.testing.assert_close(shares * 20, (shares * 20).round())
        assert layer.weight_quantizer.frozen
        assert torch.equal(layer.weight, old.weight)
    made[0].output_quantizer = before[0].output_quantizer = None
    sums = [item.sum((0, 2, 3)) if level == "channel" else item.sum() for item in squared]
    assert (sums[0] <= sums[1]).all()
    assert error(made, model) < error(before, model)


def test_the_onnx_file_of_a_reconstructed_network_agrees_layer_by_layer(monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 3)
    images = torch.randn(8, 3, 16, 16)
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2]]  # without a sum, and with one
    spec = ModelSpec("torchvision:mobilenet_v2", {"width_mult": 0.5, "inverted_residual_setting": blocks})
    model = build_model(spec).eval()
    made, record = quantize_model(model, QuantConfig(w_bits=4, a_bits=4))
    calibrate(made, [images])
    search_weight_scales(model, made, [images])
    reconstruct(model, made, [images], "block")
    artifact = Artifact(made.eval(), spec, [record])
    assert max(compare_layers(made, to_onnx(artifact, images), images).values()) <= 1


def test_a_unit_learns_the_rounding_that_gives_its_output_exactly(monkeypatch):
    """The target was made with other levels than the nearest; learning from it finds all of them."""
    monkeypatch.setattr(adaround, "STEPS", 300)
    made, _ = quantize_model(nn.Sequential(nn.Linear(6, 4, bias=False)), QuantConfig(a_bits=32, first_last="same"))
    calibrate(made, [torch.randn(4, 6)])
    layer = made[0]
    quantizer = layer.weight_quantizer
    inner = quantizer.integers(layer.weight).clamp(quantizer.qmin + 1, quantizer.qmax - 1)
    scale = quantizer.scale.view(-1, 1)
    with torch.no_grad():
        layer.weight.copy_((inner + 0.3) * scale)  # nearest: inner
    wanted = (inner + (torch.rand(4, 6) < 0.5)) * scale
    inputs = torch.randn(64, 6)
    work = adaround.Work(progress := Steps(), 0, 1)
    adaround.learn_rounding(Unit(layer, [layer]), Recorded(inputs, inputs @ wanted.T), 1, work)
    torch.testing.assert_close(layer.weight.detach(), wanted)
    assert progress.seen == [(step, 300) for step in range(1, 301)]


class Steps:
    def __init__(self):
        self.seen = []

    def step(self, label, done, total, **numbers):
        self.seen.append((done, total))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reconstruct", "block"], "training would undo --reconstruct"),
        (["--weight-calibrator", "seq-mse"], "training would undo --weight-calibrator"),
        (["--mode", "ptq", "--adaround", "--reconstruct", "block"], "--adaround means --reconstruct layer"),
        (
            ["--mode", "ptq", "--reconstruct", "layer", "--method", "lsq"],
            "--reconstruct layer found no uniformly quantized",
        ),
        (
            ["--mode", "ptq", "--weight-calibrator", "seq-mse", "--w-bits", "ternary"],
            "seq-mse found no uniformly quantized",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_would_do_nothing_are_refused(micronet, chain, tmp_path, options, message):
    few = ["--limit", 160, "-o", tmp_path / "a.safetensors"]
    done = micronet("quantize", chain / "float.safetensors", *options, *few)
    assert done.code == 2
    assert message in done.err


def test_made_images_come_closer_to_the_batch_norms_statistics_and_a_seed_repeats_them(monkeypatch):
    monkeypatch.setattr(synthetic, "STEPS", 20)
    model = floating().train()
    model.norm.momentum = 1.0
    model(IMAGES / 2 + 1)
    made = [synthetic.synthesize_images(model, (3, 12, 12), 1, seed) for seed in (1, 1, 2)]
    assert made[0].after < made[0].before
    assert torch.equal(made[0].batches[0], made[1].batches[0])
    assert not torch.equal(made[0].batches[0], made[2].batches[0])


def test_without_data_the_images_come_from_the_artifact(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "STEPS", 3)
    ptq = ["quantize", chain / "float.safetensors", "--mode", "ptq", "--calib-batches", 1, "--calib-data", "none"]
    done = micronet(*ptq, "-o", tmp_path / "a.safetensors")
    assert done.code == 0, done.err
    assert "generated 64 images; difference between their statistics and those of the batch norms: " in done.err
    assert (
        micronet("inspect", tmp_path / "a.safetensors", "--json").json["history"][-1]["config"]["calib_data"] == "none"
    )
    done = micronet("quantize", chain / "float.safetensors", "--calib-data", "none", "-o", tmp_path / "b.safetensors")
    assert done.code == 2
    assert "add --mode ptq" in done.err
    onnx = {"artifact": tmp_path / "a.onnx", "mode": "ptq", "calib_data": Path("none")}
    with pytest.raises(MicronetError, match="needs the batch norms of an artifact, but this is an ONNX file"):
        Quantize.configure(onnx)
    report = micronet("sensitivity", chain / "float.safetensors", "--limit", 160, "--json", *ptq[-4:])
    assert report.code == 0, report.err
    assert "generated 64 images" in report.err
    with pytest.raises(MicronetError, match="this network has none"):
        synthetic.synthesize_images(nn.Linear(3, 3), (3, 4, 4), 1, 1)
