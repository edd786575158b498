"""Agreement with the float network: exact figures, and any network through the commands without a label."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import micronet
from micronet.data.dataset import DataSpec
from micronet.data.load import load_data
from micronet.errors import FailedError, MicronetError
from micronet.evaluation.accuracy import check_scores, predictor, run_batch
from micronet.models.modes import train_as_evaluated
from micronet.quantization.config import QuantConfig
from micronet.stages.export import explaining_noise
from micronet.stages.quantize import Quantize
from micronet.stages.quantize_defaults import stays_close, with_defaults
from micronet.tasks.agreement import LARGEST_DB, Agreement, energy, relative_error
from micronet.tasks.task import load_task
from micronet.training import loop
from micronet.training.config import TrainConfig
from micronet.training.step import TrainStep, make_optimizer

NET = "tests/tasks/networks.py:TwoInputs"


def test_sqnr_and_cosine_are_those_of_the_formula_over_all_batches_and_the_worst_output():
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other, meter = y * 1.1 + 0.01, Agreement().meter()
    for part in (slice(0, 2), slice(2, 6)):
        meter.update([y[part], other[part]], [y[part], y[part]])
    found = meter.compute()
    noise = 10 * math.log10(float(y.square().sum() / (other - y).square().sum()))
    assert found["sqnr_db"] == found["sqnr_db/2"] == pytest.approx(noise, rel=1e-12)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(y.flatten(), other.flatten(), 0)), rel=1e-12)
    assert found["sqnr_db/1"] == LARGEST_DB and found["cosine/1"] == pytest.approx(1, rel=1e-12)
    assert found["error"] == pytest.approx(10 ** (-noise / 20), rel=1e-12)


def test_small_channels_beside_large_ones_count_like_these():
    """Scores from 0 to 1 beside boxes in pixels, and more channels than are kept apart."""
    random = torch.Generator().manual_seed(1)
    y = torch.cat([400 * torch.rand(3, 4, 10, generator=random), torch.rand(3, 12, 10, generator=random)], 1)
    meter, many = Agreement().meter(), torch.rand(2, 1000, generator=random)
    for part in (y[:1], y[1:]):
        meter.update([part * (torch.arange(16) < 4)[:, None], many], [part, many])
    found = meter.compute()
    assert found["sqnr_db"] > 40 and found["channel_sqnr_db"] == pytest.approx(-10 * math.log10(12 / 16))
    assert found["channel_sqnr_db/1"] < 2 and found["channel_sqnr_db/2"] == LARGEST_DB
    meter.update([y, many[:, :0]], [y, many[:, :0]])  # sizes may differ between batches


def test_labels_beside_floats_are_equal_or_not_and_no_signal():
    y, labels, others = torch.tensor([[3.0, 4.0]] * 4), torch.tensor([1, 300, 2, 1]), torch.tensor([1, 1, 2, 1])
    meter, alone = Agreement().meter(), Agreement().meter()
    meter.update([others, y * 1.1], [labels, y])
    alone.update(others, labels)
    found = meter.compute()
    assert found["sqnr_db"] == found["sqnr_db/2"] == pytest.approx(20, abs=1e-4) and found["cosine"] > 0.999
    assert found["equal_labels"] == found["equal_labels/1"] == 0.75 and "sqnr_db/1" not in found
    assert alone.compute() == {"equal_labels": 0.75, "error": 0.5}
    assert float(relative_error([others, y * 1.1], [labels, y])) == pytest.approx(0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_no_number_agrees_with_nothing(value):
    meter = Agreement().meter()
    meter.update([torch.ones(2, 3), torch.tensor([[1.0], [value]])], [torch.ones(2, 3), torch.ones(2, 1)])
    found = meter.compute()
    assert (found["sqnr_db"], found["sqnr_db/1"], found["sqnr_db/2"]) == (-LARGEST_DB, LARGEST_DB, -LARGEST_DB)
    assert found["cosine"] == 0 and math.isfinite(found["error"])
    assert found["channel_sqnr_db"] == pytest.approx(-LARGEST_DB) and found["channel_sqnr_db/1"] == LARGEST_DB


def test_the_loss_is_the_squared_error_that_is_measured_and_energy_does_not_depend_on_scale():
    y, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])
    meter = Agreement().meter()
    meter.update(other, y)
    assert float(relative_error(other, y)) == pytest.approx(meter.compute()["error"] ** 2) == pytest.approx(0.01)
    for scale in (1.0, 1000.0):
        x = torch.ones(3, requires_grad=True)
        energy([x * scale, (x * scale).long()]).backward()
        assert x.grad.tolist() == pytest.approx([2 / 3] * 3)


class Noisy(torch.nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_networks_that_draw_noise_are_compared_with_the_same_noise_and_not_exported():
    x, before = torch.zeros(2, 3), torch.get_rng_state()
    first, second = (run_batch(predictor(Noisy()), x) for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0 and torch.equal(torch.get_rng_state(), before)
    for model, message in ((Noisy(), "draws random numbers in eval mode"), (torch.nn.Identity(), "they differ")):
        with pytest.raises(FailedError, match=message), explaining_noise(model, x):
            raise FailedError("they differ")


def test_integers_have_no_gradients_so_energy_and_training_say_what_to_do_instead():
    with pytest.raises(MicronetError, match="--criterion l2"):
        energy([torch.ones(2).long()])
    config, task = TrainConfig(optimizer="sgd", schedule="linear"), Agreement()
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LogSoftmax(1)), torch.ones(4, 3)
    step = TrainStep(model, make_optimizer(model, config), config, torch.device("cpu"), task=task)
    model.register_forward_hook(lambda module, inputs, scores: scores.argmax(1))
    with pytest.raises(MicronetError, match=r"outputs, int64 \(N\), have no gradients; return scores, or .*ptq"):
        step([(x, torch.ones(4).long())], [4])
    model.register_forward_hook(lambda module, inputs, scores: torch.ones(4, requires_grad=True))
    task.loss = lambda outputs, targets: outputs.detach().sum()
    with pytest.raises(MicronetError, match="the task's loss has no gradients"):
        step([(x, None)], [4])


def test_networks_of_other_outputs_are_refused_with_both_shapes():
    with pytest.raises(MicronetError, match=r"float32 \(N, 3\) here, float32 \(N, 4\) in the reference"):
        relative_error(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path, random = tmp_path_factory.mktemp("agreement") / "x.npz", np.random.default_rng(0)
    np.savez(path, image=random.standard_normal((12, 1, 10, 14)), ids=random.integers(0, 20, (12, 6)))
    return path


def test_any_network_goes_through_the_commands_without_labels(inputs, micronet):
    folder = inputs.parent
    plain, int8, onnx, thin = (folder / name for name in ("a.safetensors", "q.safetensors", "q.onnx", "p.safetensors"))
    assert micronet("import", "--model", NET, "--task", "agreement", "--data", inputs, "-o", plain).code == 0
    assert micronet("quantize", plain, "--model", NET, "--mode", "ptq", "-o", int8).code == 0
    made = micronet("export-onnx", int8, "--model", NET, "--skip-timing", "-o", onnx)
    assert made.code == 0 and "larger than in float" in made.out
    rows = json.loads(micronet("compare", plain, int8, onnx, "--trust-code", "--json").out)["rows"]
    assert [row["images"] for row in rows] == [3, 3, 3]
    assert rows[0]["metrics"]["sqnr_db"] == LARGEST_DB and rows[0]["drop"] == 0
    for row in rows[1:]:
        assert 25 < row["metrics"]["sqnr_db"] < 60 and row["metrics"]["cosine"] > 0.99
        assert row["drop"] == row["metrics"]["error"] and row["accuracy"] is None
    done = micronet("prune", plain, "--model", NET, "--criterion", "taylor", "--percent", "0.25", "-o", thin)
    assert done.code == 0 and "channels" in done.out
    alone = micronet("evaluate", onnx)
    assert alone.code == 2 and "micronet compare" in alone.err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((12, 1, 10, 14)), "ids": np.zeros((11, 6), int)}, r"same length.*image \(12, 1, 10, 14\)"),
        ({"image": np.full((9, 1), np.nan), "ids": np.zeros((9, 6), int)}, "image has 9 values that are NaN"),
        ({"image": np.array(["a"] * 9)}, "expected floats, integers or booleans"),
        ({"image": np.zeros((9, 1, 10, 14))}, r"does not accept the input float32 \(N, 1, 10, 14\).*ids"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_their_shapes(arrays, message, tmp_path, micronet, inputs):
    np.savez(tmp_path / "x.npz", **arrays)
    out = tmp_path / "a.safetensors"
    done = micronet("import", "--model", NET, "--task", "agreement", "--data", tmp_path / "x.npz", "-o", out)
    assert done.code == 2

    assert re.search(message, done.err.replace("\n", " ")), done.err


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda x: [], "return one, or a tuple, a list or a dict"),
        (
            lambda x: torch.nn.Linear(3, 2).double()(torch.from_numpy(x)),
            r"weights are Double.*net\.float\(\)",
        ),
    ],
)
def test_what_a_network_returns_or_computes_in_is_named_with_the_way_on(predict, message):
    with pytest.raises(MicronetError, match=message):
        check_scores(predict, torch.zeros(1, 3), DataSpec(), task=load_task("agreement"))


def test_any_folder_of_images_gives_inputs(tmp_path):
    for number in range(8):
        Image.fromarray(np.full((6, 6), number, np.uint8)).save(tmp_path / f"{number}.png")
    data = load_data(str(tmp_path), task="agreement")
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (5, 1, 2, None)
    assert data.is_grey and data.spec.image_size == 6


def test_what_only_training_returns_is_not_compared():
    wanted, more = torch.ones(2, 3), torch.zeros(2, 3)
    assert relative_error([wanted, more], wanted) == relative_error([wanted, more], [wanted]) == 0
    with pytest.raises(MicronetError, match="different outputs"):
        relative_error([wanted[:, :2], more], [wanted])
    with pytest.raises(MicronetError, match=r"other numbers of rows .*1x3 here, 2x3 in the reference.*--task FILE"):
        relative_error(wanted[:1], wanted)


@pytest.mark.parametrize(("bits", "close"), [({}, True), ({"w_bits": 2, "a_bits": 2}, False)], ids=["8 bits", "2 bits"])
def test_a_network_that_stays_close_to_its_reference_is_trained_as_it_is_evaluated(bits, close, monkeypatch):
    """With the statistics of batches, and with dropout, no training would bring it closer."""
    calls = []
    monkeypatch.setattr(loop, "train_as_evaluated", lambda model: calls.append(train_as_evaluated(model)))
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    quantized = micronet.quantize(
        nn.Sequential(*layers), data=[torch.randn(8, 3, 6, 6) for _ in range(3)], task="agreement", epochs=1, **bits
    )
    assert len(calls) == stays_close(quantized.history) == close
    assert not stays_close(quantized.history[:-1])  # a pruned network, whose statistics have changed


def test_recurrent_layers_are_in_training_mode_on_other_devices_alone():
    for device in ("cpu", "meta"):
        net = nn.Sequential(nn.Dropout(), nn.GRU(3, 4, device=device))
        train_as_evaluated(net)
        assert [module.training for module in net] == [False, device == "meta"]


def test_the_learning_rate_of_agreement_is_a_tenth_of_that_of_labels():
    for bits, ratio in (({}, 10), ({"w_bits": 2}, 1), ({"w_bits": "binary"}, 1)):
        stage = Quantize(Path("a.safetensors"), quantization=QuantConfig(**bits))
        usual, low = (with_defaults(stage, None, task).training.lr for task in (None, "agreement"))
        assert low == pytest.approx(usual / ratio)
