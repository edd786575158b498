"""The checks of the library's procedures: training, pruning, quantization, files."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from micronet import registry
from micronet.artifact.artifact import load, save
from micronet.artifact.header import read_header
from micronet.core.progress import Silent
from micronet.data.batches import eval_batches
from micronet.errors import StoppedError
from micronet.evaluation.accuracy import evaluate, evaluating, predictor
from micronet.evaluation.cost import count_macs
from micronet.models.device import pick_device
from micronet.pruning.config import PruneConfig, SparsityConfig
from micronet.pruning.groups import find_groups
from micronet.pruning.prune import prune_model
from micronet.quantization.calibrate import calibrate, collect, freeze, frozen, observing, set_ranges
from micronet.quantization.config import CalibrationConfig, QuantConfig
from micronet.quantization.equalize import equalize
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.recovery import correct_biases, reestimate_norms
from micronet.quantization.sensitivity import Probe, keep_sensitive, measure_sensitivity
from micronet.quantization.weight_scales import search_weight_scales
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.torch import EagerPredictor
from micronet.stages.prune_network import accumulate_gradients
from micronet.tasks.agreement import Agreement
from micronet.training.config import NO_HOOKS, RunContext, TrainHooks
from micronet.training.distillation import Teacher
from micronet.training.loop import Trainer
from tests.devices.network import QUICK, artifact, batches, dataset, fit, trained
from tests.devices.table import ADAM, FLOAT, HALF, LEVEL, SIGN, Outcome, changed, check, outcome

EXAMPLE = torch.zeros(2, 3, 8, 8)  # on the CPU, as the commands make it


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the validation images."""
    with evaluating(model) as predict:
        return evaluate(predict, eval_batches(dataset().validation, dataset().spec)).accuracy


@check("train sgd", FLOAT, accumulate=2, weight_decay=1e-4, label_smoothing=0.1)
@check("train adam", ADAM, optimizer="adam")
@check("train bf16", HALF, amp="bf16")
@check(
    "train fast",
    ADAM,
    optimizer="muon",
    schedule="linear",
    ema=0.5,
    flip="alternating",
    cutout=3,
    whiten="on",
    start_size=4,
)
def train(device: torch.device, folder: Path, **options: Any) -> Outcome:
    """Train the float network."""
    fitted = fit(trained(device), device, folder, replace(QUICK, epochs=2, **options))
    return outcome(fitted.model, loss=fitted.metrics["test_loss"])


@check("resume", FLOAT)
def resume(device: torch.device, folder: Path) -> Outcome:
    """Stop a training in its first epoch and resume it from the checkpoint."""
    with suppress(StoppedError):
        fit(trained(device), device, folder, QUICK, deadline=0.0)
    return outcome(fit(trained(device), device, folder, QUICK, resume=True).model)


@check("distillation", FLOAT)
def distill(device: torch.device, folder: Path) -> Outcome:
    """Train with a teacher."""
    model = nn.Sequential(trained(device))
    teacher = Teacher(trained(device).eval(), 0.5, 4.0)
    run = RunContext(folder / "student.safetensors", device)
    Trainer(model, dataset(), QUICK, run, {}, NO_HOOKS, teacher).fit()
    return outcome(model)


@check("agreement", FLOAT)
def agree(device: torch.device, folder: Path) -> Outcome:
    """Train a network to give the outputs of a reference network."""
    model, reference = trained(device), predictor(trained(device).eval())
    nn.init.zeros_(model.fc2.bias)
    data, run = dataset(Agreement()).with_reference(reference), RunContext(folder / "agreed.safetensors", device)
    Trainer(model, data, QUICK, run, {}).fit()
    return outcome(model)


@check("sparse-train bn-scale", FLOAT, criterion="bn-scale")
@check("sparse-train l1", FLOAT, criterion="l1")
@check("sparse-train l2", FLOAT, criterion="l2")
def sparse_train(device: torch.device, folder: Path, criterion: Any) -> Outcome:
    """Train with a pruning criterion's penalty."""
    config = SparsityConfig(s=0.01, criterion=criterion)
    model = trained(device)
    chosen = registry.resolve(registry.CRITERIA, criterion, "criterion")
    penalty = chosen.penalty(model, find_groups(model, EXAMPLE), config.s)
    return outcome(fit(model, device, folder, hooks=TrainHooks(penalty=penalty, keep="last")).model)


@check("prune bn-scale", FLOAT, criterion="bn-scale")
@check("prune l1", FLOAT, criterion="l1")
@check("prune l2", FLOAT, criterion="l2")
@check("prune fpgm", FLOAT, criterion="fpgm")
@check("prune random", FLOAT, criterion="random")
@check("prune taylor", FLOAT, criterion="taylor")
@check("prune to target macs", FLOAT, criterion="l1", target_macs=0.5)
def prune(device: torch.device, folder: Path, **options: Any) -> Outcome:
    """Prune in two steps, each followed by training."""
    model = trained(device)
    part = PruneConfig(**options).share_per_step(2)
    for _ in range(2):
        if part.criterion == "taylor":
            accumulate_gradients(model, dataset(), RunContext(folder / "gradients.safetensors", device))
        model, _, _ = prune_model(model, part, EXAMPLE)
        model = fit(model, device, folder).model
    return outcome(model, macs=count_macs(model, EXAMPLE[:1]))


@check("qat iao minmax", LEVEL)
@check("qat iao moving-average", LEVEL, weight_observer="moving-average")
@check("qat iao asym layer", LEVEL, q_type="asym", q_level="layer", w_bits=4)
@check("qat iao bf16", LEVEL, amp="bf16")
@check("qat dorefa", LEVEL, method="dorefa", w_bits=4, a_bits=4)
@check("qat lsq", LEVEL, method="lsq", w_bits=4, a_bits=4)
@check("qat lsq layer", LEVEL, method="lsq", q_level="layer", first_last="same")
@check("qat binary binary", SIGN, w_bits="binary", a_bits="binary")
@check("qat ternary binary", SIGN, w_bits="ternary", a_bits="binary", a_ste="soft")
@check("qat ternary 8", LEVEL, w_bits="ternary", w_ste="saturate")
@check("qat bn-fused minmax", LEVEL, bn_fuse=True)
@check("qat bn-fused moving-average", LEVEL, bn_fuse=True, weight_observer="moving-average")
@check("qat bn-fused lsq", LEVEL, bn_fuse=True, method="lsq")
def qat(device: torch.device, folder: Path, amp: Any = "off", **options: Any) -> Outcome:
    """Quantize, calibrate, train with the quantizers, then fold the batch norms."""
    model, record = quantize_model(trained(device), QuantConfig(**options))
    calibrate(model, batches(device))
    fitted = fit(model, device, folder, replace(QUICK, amp=amp), TrainHooks(observing))
    folded, _ = fold_model(fitted.model, [record])
    return outcome(fitted.model, folded=outcome(folded).numbers["scores"])


@check("qaft", LEVEL)
def qaft(device: torch.device, folder: Path) -> Outcome:
    """Train with every range and batch norm frozen."""
    model, _ = quantize_model(trained(device), QuantConfig(w_bits=4))
    calibrate(model, batches(device))
    freeze(model)
    return outcome(fit(model, device, folder, hooks=TrainHooks(frozen)).model)


@check("ptq minmax", LEVEL, calibrator="minmax")
@check("ptq percentile", LEVEL, calibrator="percentile", percentile=99.0)
@check("ptq entropy", LEVEL, calibrator="entropy")
@check("ptq mse", LEVEL, calibrator="mse")
@check("ptq mse asym", LEVEL, calibrator="mse", q_type="asym")
@check("ptq mse lsq", LEVEL, calibrator="mse", method="lsq", w_bits=4)
def ptq(device: torch.device, folder: Path, calibrator: str, percentile: float = 99.99, **options: Any) -> Outcome:
    """Set the ranges from statistics, without training."""
    model, _ = quantize_model(trained(device), QuantConfig(a_bits=4, **options))
    set_ranges(model, collect(model, batches(device)), calibrator, percentile)
    return outcome(model)


@check("reconstruct", LEVEL)
def round_weights(device: torch.device, folder: Path) -> Outcome:
    """Choose the scales of the weights, then their rounding, first by layers, then by blocks."""
    floating = trained(device)
    model, _ = quantize_model(floating, QuantConfig(w_bits=3, a_bits=4))
    calibrate(model, batches(device))
    search_weight_scales(floating, model, batches(device))
    with patch("micronet.quantization.adaround.STEPS", 5):
        reconstruct(floating, model, batches(device), "layer")
        reconstruct(floating, model, batches(device), "block")
    return outcome(model)


@check("bias correction", LEVEL)
def correct(device: torch.device, folder: Path) -> Outcome:
    """Correct the biases of a network of few bits."""
    floating = trained(device)
    model, _ = quantize_model(floating, QuantConfig(w_bits=3))
    calibrate(model, batches(device))
    return outcome(model, layers=correct_biases(floating, model, batches(device)))


@check("batch norm re-estimation", LEVEL)
def reestimate(device: torch.device, folder: Path) -> Outcome:
    """Estimate the statistics of the batch norms again."""
    model, _ = quantize_model(trained(device), QuantConfig(w_bits=3))
    calibrate(model, batches(device))
    return outcome(model, norms=reestimate_norms(model, batches(device)))


@check("equalization", FLOAT)
def equalized(device: torch.device, folder: Path) -> Outcome:
    """Fold the batch norms, then balance the weights of layers that follow one another."""
    model, _ = fold_model(trained(device))
    return outcome(model, pairs=equalize(model))


@check("target-drop", LEVEL)
def target_drop(device: torch.device, folder: Path) -> Outcome:
    """Measure each layer's sensitivity, and keep the most sensitive layers at 8 bits."""
    model, config = trained(device), QuantConfig(w_bits=2)
    probe = Probe(batches(device), CalibrationConfig(), accuracy)
    ranked = measure_sensitivity(model, config, probe, Silent())
    kept = keep_sensitive(model, config, ranked, probe, 0.0)
    quantized, _ = quantize_model(model, kept)
    calibrate(quantized, batches(device))
    return outcome(quantized, sqnr_db=[item.sqnr_db for item in sorted(ranked)])


@check("evaluate", FLOAT)
def evaluated(device: torch.device, folder: Path) -> Outcome:
    """Save a network, and evaluate the file on the device."""
    path = folder / "saved.safetensors"
    save(artifact(trained(device)), path)
    network = EagerPredictor(path, RuntimeOptions(device=str(device), trust_code=True))
    found = evaluate(network, eval_batches(dataset().test, dataset().spec))
    return Outcome({"loss": torch.tensor(found.loss), "macs": torch.tensor(network.macs((3, 8, 8)))})


@check("save and reload", LEVEL)
def reload(device: torch.device, folder: Path) -> Outcome:
    """Save a quantized network from the device, and load it to the device again."""
    model, record = quantize_model(trained(device), QuantConfig(method="lsq", w_bits=4))
    calibrate(model, batches(device))
    path = folder / "quantized.safetensors"
    save(artifact(model).after(record), path)
    loaded = load(path, trust_code=True).model.to(device)
    assert torch.equal(outcome(loaded).numbers["scores"], outcome(model).numbers["scores"])
    return outcome(loaded)


@check("tied weights", FLOAT)
def tied(device: torch.device, folder: Path) -> Outcome:
    """Save a network with one tensor under two names from the device: it is stored once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = model[1].weight
    save(artifact(model.to(device)), folder / "tied.safetensors")
    return Outcome({"stored": torch.tensor(len(read_header(folder / "tied.safetensors")[1].tensors))})


@check("device names", None)
def names(device: torch.device, folder: Path) -> Outcome:
    """Find the device by its name, as --device does."""
    assert pick_device(str(device)) == device
    assert pick_device(device.type).type == device.type
    return Outcome({})


@check("device is another one", None)
def refusals(device: torch.device, folder: Path) -> Outcome:
    """Mix the device's tensors with the CPU's, which it refuses; without that, the other checks would show nothing."""
    x, layer = torch.randn(3, 4, device=device), nn.Linear(4, 4)
    weight = layer.weight
    assert layer.to(device).weight is weight and weight.device.type == device.type
    assert weight.data_ptr() != layer.bias.data_ptr()
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # a CPU tensor without dimensions may mix
    assert float(x.abs().max()) > 0 and torch.tensor([1.0], device=device).tolist() == [1.0]
    with torch.inference_mode():
        assert weight.detach().view(-1).device.type == device.type
    for attempt, error in ((lambda: x + x.cpu(), RuntimeError), (x.numpy, TypeError)):
        try:
            attempt()
        except error:
            continue
        raise AssertionError("the device takes the CPU's tensors")
    return Outcome({})


@check("fp16 gradient scaler", None)
def fp16_scaler(device: torch.device, folder: Path) -> Outcome:
    """Train in fp16 from an empty gradient scaler, and again with a stop and a resume: the ends are equal."""
    config = replace(QUICK, amp="fp16")
    whole = fit(trained(device), device, folder, config)
    with suppress(StoppedError):
        fit(trained(device), device, folder, config, deadline=0.0)
    resumed = fit(trained(device), device, folder, config, resume=True)
    first, second = outcome(whole.model), outcome(resumed.model)
    assert not changed(first, second), "the resumed training ends elsewhere"
    assert all(bool(tensor.isfinite().all()) for tensor in second.state.values())
    return second
