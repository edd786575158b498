"""Ways to win accuracy back: each keeps what it must keep, and helps where it is meant to, on a depthwise network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from micronet.core.progress import Silent
from micronet.errors import FailedError, MicronetError
from micronet.quantization.adaround import rectified_sigmoid
from micronet.quantization.calibrate import calibrate, collect, each_quantizer, set_ranges
from micronet.quantization.config import CalibrationConfig, QuantConfig
from micronet.quantization.equalize import equalize
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model, restore
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.recovery import correct_biases, give_biases, reestimate_norms
from micronet.quantization.sensitivity import Probe, keep_sensitive, measure_sensitivity
from micronet.quantization.walk import call_order

BATCHES = [torch.randn(16, 3, 16, 16) for _ in range(3)]


def adaround(floating, model, batches):
    return reconstruct(floating, model, batches, "layer").layers


def depthwise():
    """A small network of depthwise and pointwise convolutions whose channels differ widely in size."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for batch in BATCHES:
        model.train()(batch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.logspace(-1.5, 1, 8)[torch.randperm(8)]
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def quantized(model, **config):
    made, record = quantize_model(model, QuantConfig(**config))
    set_ranges(made, collect(made, BATCHES), "minmax", 100.0)
    return made, record


def error(left, right):
    out = [torch.cat([model.eval()(batch) for batch in BATCHES]).detach() for model in (left, right)]
    return float((out[0] - out[1]).norm() / out[1].norm())


def test_equalizing_changes_nothing_in_float_and_helps_one_scale_a_layer():
    model, _ = fold_model(depthwise())
    model = model.double()
    balanced = copy.deepcopy(model)
    assert equalize(balanced) == 4
    x = BATCHES[0].double()
    torch.testing.assert_close(balanced(x), model(x), rtol=1e-9, atol=1e-9)
    before, _ = quantized(model.float(), q_level="layer", w_bits=8, a_bits=32)
    after, _ = quantized(balanced.float(), q_level="layer", w_bits=8, a_bits=32)
    assert error(after, model) < error(before, model)
    for first, second in ((3, 6), (9, 12)):  # a depthwise and a pointwise convolution
        out = balanced[first].weight.flatten(1).abs().amax(1)
        into = balanced[second].weight.transpose(0, 1).flatten(1).abs().amax(1)
        torch.testing.assert_close(out, into, rtol=0.05, atol=0)
    with pytest.raises(MicronetError, match="with only a ReLU between them"):
        equalize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def test_norms_estimated_anew_are_the_plain_statistics_and_touch_no_weight():
    model = depthwise()
    weights = {
        name: value.clone() for name, value in model.state_dict().items() if "running" not in name and "num" not in name
    }
    assert reestimate_norms(model, BATCHES) == 5
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    firsts = [model[0](batch) for batch in BATCHES]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in firsts]).mean(0))
    variance = torch.stack([x.var((0, 2, 3)) for x in firsts]).mean(0)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model[1].momentum == 0.1
    assert not model.training
    with pytest.raises(MicronetError, match="needs batch norms"):
        reestimate_norms(nn.Sequential(nn.Linear(2, 2)), BATCHES)


@pytest.mark.parametrize("folded", [True, False])
def test_corrected_layers_have_the_float_networks_means(folded):
    model = depthwise()
    if folded:
        model, _ = fold_model(model)
    made, record = quantized(model, w_bits=3, a_bits=32, first_last="same")
    before = error(made, model)
    assert correct_biases(model, made, BATCHES) == len(record.result["inputs"])
    assert error(made, model) < before
    means = [torch.stack([network(batch).mean(0) for batch in BATCHES]).mean(0) for network in (made.eval(), model)]
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


class TwoEnds(nn.Module):
    """A network that declares its last layer beside its first."""

    def __init__(self):
        super().__init__()
        self.ends, self.middle = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Linear(8, 4)]), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.ends[1](self.middle(self.ends[0](x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("recover", [correct_biases, adaround])
def test_layers_are_recovered_in_the_order_of_the_forward_pass(recover, monkeypatch):
    monkeypatch.setattr("micronet.quantization.adaround.STEPS", 20)
    floating = TwoEnds().eval()
    model, _ = quantize_model(floating, QuantConfig(w_bits=2, first_last="same"))
    calibrate(model, BATCHES)
    assert call_order(model, ["ends.0", "ends.1", "middle"], BATCHES[0]) == ["ends.0", "middle", "ends.1"]
    whole = torch.cat(BATCHES)
    assert recover(floating, model, [whole]) == 3
    if recover is correct_biases:  # the last layer's correction knows of the middle's
        torch.testing.assert_close(model(whole).mean(0), floating(whole).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [True, False])
def test_layers_without_a_bias_get_one_that_restores_their_mean_and_reloads(linear):
    """Shifts of several batches average to the exact correction if what lies between is linear; else one batch's do."""
    between = nn.Identity() if linear else nn.ReLU()
    floating = nn.Sequential(nn.Conv2d(3, 8, 3, 4, bias=False), between, nn.Conv2d(8, 8, 3), nn.Flatten(),
                             nn.Linear(32, 4, bias=False)).eval()  # fmt: skip
    model, record = quantized(floating, w_bits=3, a_bits=32, first_last="same")
    uncorrected = model.state_dict().keys()
    record.result["biases"] = give_biases(model, BATCHES[0][:2])
    assert record.result["biases"] == ["0", "4"]
    whole = torch.cat(BATCHES)
    assert correct_biases(floating, model, BATCHES if linear else [whole]) == 3
    torch.testing.assert_close(model.eval()(whole).mean(0), floating(whole).mean(0), rtol=1e-4, atol=1e-5)
    again = restore(copy.deepcopy(floating), record)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(whole), model(whole))
    del record.result["biases"]  # as in older files
    assert restore(copy.deepcopy(floating), record).state_dict().keys() == uncorrected


def test_learned_rounding_beats_the_nearest_and_stays_on_the_grid(monkeypatch):
    monkeypatch.setattr("micronet.quantization.adaround.STEPS", 300)
    model, _ = fold_model(depthwise())
    made, _ = quantized(model, w_bits=3, a_bits=32, first_last="same")
    nearest = error(made, model)
    whole = {name: module.weight.clone() for name, module in made.named_modules() if hasattr(module, "weight")}
    assert adaround(model, made, BATCHES) == 6
    assert error(made, model) < 0.95 * nearest
    for name, slot, quantizer in each_quantizer(made):
        if slot == "weight_quantizer":
            weight = made.get_submodule(name).weight
            torch.testing.assert_close(quantizer(weight), weight.detach(), rtol=1e-6, atol=1e-8)
            steps = (weight - whole[name]).abs() / quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
            assert steps.max() <= 1 + 1e-4  # up or down, never farther
            assert quantizer.frozen
    assert rectified_sigmoid(torch.tensor([-100.0, 100.0])).tolist() == [0, 1]
    with pytest.raises(MicronetError, match="--method iao"):
        adaround(model, quantized(model, method="lsq", a_bits=32)[0], BATCHES)


def test_sensitivity_ranks_layers_and_a_target_keeps_the_worst_at_eight_bits():
    model, _ = fold_model(depthwise())
    config = QuantConfig(w_bits=2, a_bits=8, q_level="layer", first_last="same")

    def accuracy(network):  # how near the scores are: unlike a share of right answers, every layer moves it
        return 1 - error(network, model)

    probe = Probe(BATCHES, CalibrationConfig(), accuracy)
    ranked = measure_sensitivity(model, config, probe, Silent())
    assert len(ranked) == 6
    assert [item.sqnr_db for item in ranked] == sorted(item.sqnr_db for item in ranked)
    alone, _ = quantized(model, w_bits=2, a_bits=8, q_level="layer", first_last="same", include=ranked[0].layer)
    assert {name for name, slot, _ in each_quantizer(alone) if slot == "weight_quantizer"} == {ranked[0].layer}
    loose = keep_sensitive(model, config, ranked, probe, 1.0)
    assert loose.keep_8bit is None
    whole, _ = quantized(model, w_bits=2, a_bits=8, q_level="layer", first_last="same")
    target = (1 - accuracy(whole)) / 3
    tight = keep_sensitive(model, config, ranked, probe, target)
    kept = tight.keep_8bit.split(",")
    assert kept == [item.layer for item in ranked[: len(kept)]]
    bits = {
        name: quantizer.bits
        for name, slot, quantizer in each_quantizer(quantize_model(model, tight)[0])
        if slot == "weight_quantizer"
    }
    assert {name for name, number in bits.items() if number == 8} == set(kept)
    with pytest.raises(FailedError, match="target-drop"):
        keep_sensitive(model, config, ranked, replace(probe, accuracy=lambda m: float(m is model)), 0.0)
    mine = keep_sensitive(model, replace(config, keep_8bit=ranked[-1].layer), ranked, probe, 1.0)
    assert mine.keep_8bit == ranked[-1].layer


@pytest.mark.parametrize(
    "option",
    [
        ["--equalize"],
        ["--adaround"],
        ["--reconstruct", "block"],
        ["--weight-calibrator", "seq-mse"],
        ["--bias-correct"],
        ["--bn-reestimate"],
        ["--target-drop", "50"],
        ["--calib-data", "DIGITS"],
        ["--mode", "qat", "--calibrator", "mse"],
    ],
    ids=lambda option: option[0],
)
def test_the_commands_option_runs_reloads_and_is_recorded(micronet, lenet, tmp_path, monkeypatch, option):
    from PIL import Image

    monkeypatch.setattr("micronet.quantization.adaround.STEPS", 20)  # how well it rounds is measured above
    (tmp_path / "images").mkdir()
    Image.new("L", (40, 32)).save(tmp_path / "images" / "a.png")
    option = [tmp_path / "images" if word == "DIGITS" else word for word in option]
    path = tmp_path / "a.safetensors"
    mode = ["--epochs", 1] if "--mode" in option else ["--mode", "ptq"]
    start = ["quantize", lenet, *mode, "--w-bits", 4, "--limit", 160]
    done = micronet(*start, *option, "-o", path)
    assert done.code == 0, done.err
    record = micronet("inspect", path, "--json").json["history"][-1]
    assert record["config"][option[0].removeprefix("--").replace("-", "_")]
    assert micronet("evaluate", path).code == 0
    fused = tmp_path / "fused.safetensors"
    if option[0] == "--equalize":
        fused = path
    else:
        assert micronet("bn-fuse", path, "-o", fused).code == 0
    if option[0] in ("--equalize", "--bias-correct", "--target-drop"):  # the others leave a usual network
        done = micronet("export-onnx", fused, "-o", tmp_path / "a.onnx")
        assert done.code == 0, done.err


def test_statistics_are_kept_for_other_bits_and_refused_for_another_network(micronet, chain, tmp_path):
    cache = ["--calib-cache", tmp_path / "cache.safetensors"]
    start = ["quantize", chain / "float.safetensors", "--mode", "ptq", "--limit", 160]
    assert "wrote" in micronet(*start, *cache, "-o", tmp_path / "a.safetensors").err
    assert "activation statistics from" in micronet(*start, *cache, "--a-bits", 4, "-o", tmp_path / "b.safetensors").err
    assert micronet(*start, "--a-bits", 4, "-o", tmp_path / "c.safetensors").code == 0
    from safetensors.torch import load_file

    left, right = (load_file(tmp_path / name) for name in ("b.safetensors", "c.safetensors"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    other = tmp_path / "other.safetensors"
    assert micronet("train", "--width", 0.1, "--limit", 100, "--epochs", 1, "--seed", 2, "-o", other).code == 0
    done = micronet("quantize", other, "--mode", "ptq", *cache, "-o", tmp_path / "d.safetensors")
    assert done.code == 2
    assert "a different artifact" in done.err
    cache[1].write_bytes(b"garbage")
    done = micronet(*start, *cache, "-o", tmp_path / "d.safetensors")
    assert done.code == 2
    assert "not a calibration statistics file" in done.err
    assert (
        "is not a folder of images"
        in micronet(*start, "--calib-data", tmp_path / "no", "-o", tmp_path / "d.safetensors").err
    )


def test_qaft_trains_weights_and_moves_no_range(micronet, chain, tmp_path):
    from micronet.artifact.artifact import load

    path, again = tmp_path / "qaft.safetensors", tmp_path / "again.safetensors"
    few = ["--epochs", 1, "--limit", 160]
    done = micronet("quantize", chain / "int8.safetensors", "--mode", "qaft", *few, "-o", path)
    assert done.code == 0, done.err
    assert micronet("finetune", path, *few, "-o", again).code == 0
    before, after, later = (load(p).model.state_dict() for p in (chain / "int8.safetensors", path, again))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.endswith((".weight", ".bias", ".frozen")) for name in moved)
    assert any(name.endswith("conv.weight") for name in moved)
    for name in before:
        if "running" in name or "scale" in name:
            assert torch.equal(before[name], later[name])
    assert load(path).history[-1].config["mode"] == "qaft"
    assert load(path).history[-1].config["lr"] == 1e-5
    done = micronet("quantize", chain / "float.safetensors", "--mode", "qaft", "-o", tmp_path / "x.safetensors")
    assert done.code == 2
    assert "--mode ptq" in done.err


def test_sensitivity_prints_draws_and_speaks_json(micronet, lenet, tmp_path):
    start = ["sensitivity", lenet, "--w-bits", 2, "--a-bits", 8, "--limit", 160]
    rows = micronet(*start, "--json").json
    assert len(rows) == 4
    assert rows[0]["sqnr_db"] <= rows[-1]["sqnr_db"]
    assert "SQNR" in micronet(*start).out
    pytest.importorskip("matplotlib")
    assert micronet(*start, "--plot", tmp_path / "a.svg").code == 0
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert micronet(*start, "--plot", tmp_path / "a.nonsense").code == 2


def test_equalizing_leaves_alone_what_it_would_change():
    """ReLU6 is not homogeneous; a linear layer may read another axis than the channels'."""
    for model, images in (
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3)), BATCHES[0]),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Linear(8, 5)), torch.randn(2, 3, 8)),
    ):
        before = model(images)
        with pytest.raises(MicronetError, match="no consecutive layers"):
            equalize(model)
        assert torch.equal(model(images), before)


def test_learned_rounding_sees_what_a_layer_gives_before_an_in_place_relu(monkeypatch):
    monkeypatch.setattr("micronet.quantization.adaround.STEPS", 50)
    model, _ = fold_model(depthwise())
    found = []
    for inplace in (False, True):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        made, _ = quantized(model, w_bits=3, a_bits=32, first_last="same")
        torch.manual_seed(0)  # it draws which images each step takes
        adaround(model, made, BATCHES)
        found.append(made.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "ptq", "--epochs", 3], "does not train"),
        (["--mode", "ptq", "--lr", 0.1], "does not train"),
        (["--mode", "qaft", "--w-bits", 4], "drop the quantization options"),
        (["--q-type", "asym", "--a-sign", "signed"], "--a-sign signed has no effect with --q-type asym"),
        (["--bn-fuse", "--equalize"], "drop it"),
        (["--bn-fuse", "--w-bits", 32], "found no quantized convolution"),
        (["--include", "nothing"], "unknown layer"),
        (["--calib-data", "README.md"], "is not a folder of images"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_would_do_nothing_are_refused(micronet, chain, tmp_path, options, message):
    done = micronet("quantize", chain / "float.safetensors", *options, "-o", tmp_path / "a.safetensors")
    assert done.code == 2
    assert message in done.err


def test_statistics_are_of_the_equalized_network(micronet, chain, tmp_path):
    start = ["quantize", chain / "float.safetensors", "--mode", "ptq", "--limit", 160]
    cache = ["--calib-cache", tmp_path / "c.safetensors"]
    assert micronet(*start, *cache, "-o", tmp_path / "a.safetensors").code == 0
    for more in (["--equalize"], ["--calib-batches", 1], ["--seed", 5]):
        done = micronet(*start, *cache, *more, "-o", tmp_path / "b.safetensors")
        assert done.code == 2
        assert "a different artifact or different images" in done.err


def test_a_training_that_loses_more_than_the_target_fails_and_writes_nothing(micronet, lenet, tmp_path):
    few = ["--epochs", 1, "--limit", 1000, "--lr", 5, "--preset", "plain", "--device", "cpu"]
    out = tmp_path / "q.safetensors"
    done = micronet("quantize", lenet, "--target-drop", 5, *few, "-o", out)
    assert done.code == 1
    assert "points after qat, but --target-drop allows only 5" in done.err
    assert not out.exists()
