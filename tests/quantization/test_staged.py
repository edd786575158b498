"""Staged training: float weights between quantized activations first, quantized weights later."""

import pytest
import torch
from safetensors.torch import load_file

from micronet.artifact.artifact import load
from micronet.models.build import ModelSpec, build_model
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.quantization.staged import StagedWeights

IMAGES = torch.randn(4, 3, 16, 16)
BINARY = ["quantize", "--w-bits", "binary", "--a-bits", "binary", "--epochs", "2", "--limit", "100", "--amp", "off"]


def network(w_bits):
    model = build_model(ModelSpec("nin_gc", {"width": 0.1}))
    quantized, _ = quantize_model(model, QuantConfig(w_bits=w_bits, a_bits="binary", first_last="float"))
    calibrate(quantized, [IMAGES])
    return quantized.eval()


@pytest.mark.parametrize("w_bits", ["binary", "ternary"])
def test_weights_are_float_up_to_a_share_of_the_steps_and_quantized_outside_of_training(w_bits):
    model, only_activations = network(w_bits), network(32)
    only_activations.load_state_dict(model.state_dict())
    both, one = model(IMAGES), only_activations(IMAGES)
    assert not torch.equal(both, one)
    staged = StagedWeights(model, 0.5)
    with staged.observing(model):
        for done, expected in ((0.0, one), (0.49, one), (0.5, both), (0.99, both), (0.2, one)):
            staged.before_step(done)
            torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=0)
    assert torch.equal(model(IMAGES), both)
    with pytest.raises(RuntimeError, match="stop"), staged.observing(model):
        staged.before_step(0.0)
        raise RuntimeError("stop")
    assert torch.equal(model(IMAGES), both)


def test_a_staged_training_goes_on_bit_identical_after_a_stop(micronet, tmp_path):
    floating, whole, stopped = (tmp_path / f"{name}.safetensors" for name in ("float", "whole", "stopped"))
    train = ["train", "--model", "lenet_bn", "--limit", "100", "--epochs", "1"]
    assert micronet(*train, "-o", floating).code == 0
    staged = [*BINARY, floating, "--float-weights", "0.6", "--distill-weight", "0"]
    assert micronet(*staged, "-o", whole).code == 0
    assert micronet(*staged, "-o", stopped, "--max-time", "0").code == 3
    assert micronet(*staged, "-o", stopped, "--resume", "--float-weights", "0.5").code == 2
    assert micronet(*staged, "-o", stopped, "--resume").code == 0
    left, right = load_file(whole), load_file(stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)
    # A training that began when sym was the default.
    within = ["--target-drop", "90", "--w-bits", "4", "--limit", "100"]
    earlier = ["quantize", floating, *within, "--epochs", "1", "--amp", "off", "-o", tmp_path / "sym.safetensors"]
    assert micronet(*earlier, "--q-type", "sym", "--max-time", "0").code == 3
    assert micronet(*earlier, "--resume").code == 0
    assert load(earlier[-1]).history[-1].config["q_type"] == "sym"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "ptq"], "--float-weights only applies to --mode qat; drop it, or drop --mode"),
        (["--patience", "2"], "--patience would stop the training before weights are quantized; drop --float-weights"),
        (["--w-bits", "32"], "--float-weights requires quantized weights and activations"),
        (["--a-bits", "32"], "--float-weights requires quantized weights and activations"),
    ],
    ids=str,
)
def test_float_weights_without_effect_are_refused(micronet, options, message):
    done = micronet("quantize", *BINARY[1:5], "--float-weights", "0.5", *options)
    assert done.code == 2
    assert message in done.err
