"""The quantize command's work: a float artifact, however it is got, through calibration and training."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact, load
from micronet.artifact.history import StageRecord, check_order
from micronet.cli import stages
from micronet.cli.options import DataOptions, ModelOptions
from micronet.core.files import check_output_path
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.image_files import list_images
from micronet.data.split import FileSplit, ImageSplit, random_subset
from micronet.errors import FailedError, MicronetError
from micronet.graph.trace import trace
from micronet.models import transformer
from micronet.quantization.adaround import adaround
from micronet.quantization.calibrate import calibrate, freeze, freeze_activations, frozen, observing
from micronet.quantization.calibration_config import CalibrationConfig, RangeConfig
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.ptq import Statistics, collect, load_statistics, save_statistics, set_ranges
from micronet.quantization.quantize import quantize_model
from micronet.quantization.recovery import correct_biases, equalize, reestimate_norms
from micronet.quantization.recovery_config import RecoveryConfig
from micronet.quantization.sensitivity import Probe, keep_sensitive, measure_sensitivity
from micronet.training import distributed
from micronet.training.config import TrainConfig
from micronet.training.loop import RunContext, TrainHooks, check_model_fits, fit_artifact

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Wish:
    """What is asked of the command. ``path``: the artifact's file."""

    quantization: QuantConfig
    calibration: CalibrationConfig
    recovery: RecoveryConfig
    training: TrainConfig
    data: DataOptions
    path: Path


def float_artifact(model: ModelOptions, data: DataOptions, run: RunContext) -> tuple[Artifact, Path]:
    """Train the network that there is no artifact of yet, and keep it beside the output; return it and its path."""
    path = run.output.with_name(f"{run.output.stem}-float.safetensors")
    if run.resume and distributed.from_rank_zero(path.exists):
        artifact = load(path, model.model if ":" in model.name else None)
        if artifact.spec.name != model.name:
            raise MicronetError(f"{path} is a {artifact.spec.name}, not a {model.name}; give another -o, or --force")
        return artifact, path
    distributed.from_rank_zero(lambda: check_output_path(path, run.force))
    artifact = stages.train(model, data, TrainConfig(), replace(run, output=path))
    stages.keep(artifact, path)
    run.progress.line(f"wrote {path}  test accuracy {artifact.metrics['test_accuracy']:.2%}")
    return artifact, path


def quantize(artifact: Artifact, wish: Wish, run: RunContext) -> Artifact:
    """Place quantizers, set their ranges from images that are not augmented, then (QAT) train with them."""
    check_order(artifact.history, "quantize")
    recovery = wish.recovery
    if wish.quantization.bn_fuse and (recovery.equalize or recovery.bias_correct or recovery.bn_reestimate):
        raise MicronetError(
            "--bn-fuse folds batch norms while training; leave it out with --equalize, --bias-correct, --bn-reestimate"
        )
    dataset = stages.open_data(wish.data, artifact, run.seed)
    check_model_fits(artifact.model, dataset)
    original = artifact.model.to(run.device)
    if wish.recovery.equalize:
        artifact = _equalized(artifact, run)
    config = wish.quantization
    if wish.recovery.target_drop is not None:
        config = _meeting_target(artifact.model, dataset, wish, run)
    model, record = quantize_model(artifact.model, config)
    training = wish.training if wish.calibration.mode == "qat" else replace(wish.training, epochs=0)
    _set_ranges(model, artifact.model, dataset, wish, run)
    floating = transformer.with_split_attentions(artifact.model) if record.result["attention"] else artifact.model
    _recover(floating, model, dataset, wish, run)
    began = replace(artifact, model=model, history=[*artifact.history, record])
    said = {**_said(wish.calibration), **{name: value for name, value in recovery.to_json().items() if value}}
    fitted = fit_artifact(began, dataset, training, run, TrainHooks(observing, config=said))
    asked = {**config.to_json(), **said}
    if training.epochs:
        asked |= training.to_json()
    if recovery.target_drop is not None:
        accuracy = stages.validation_accuracy(dataset)
        _check_target(lost=accuracy(original) - accuracy(fitted.model), wish=wish)
    return replace(fitted, history=[*artifact.history, StageRecord(record.stage, asked, record.result)])


def qaft(artifact: Artifact, wish: Wish, run: RunContext) -> Artifact:
    """Train a quantized artifact with its ranges and batch norms frozen."""
    if not any(record.stage == "quantize" for record in artifact.history):
        raise MicronetError(f"--mode qaft trains a quantized artifact; first: micronet quantize {wish.path} --mode ptq")
    check_order(artifact.history, "finetune")
    dataset = stages.open_data(wish.data, artifact, run.seed)
    freeze(artifact.model)
    procedure = TrainHooks(frozen, config={"mode": "qaft"})
    return stages.fit_stage("finetune", artifact, dataset, wish.training, run, procedure)


def _equalized(artifact: Artifact, run: RunContext) -> Artifact:
    """Fold what batch norms there are, then balance the layers."""
    graph = trace(artifact.model)
    if graph is not None and graph.conv_bn_pairs():
        folded, record = fold_model(artifact.model)
        artifact = artifact.after(record, model=folded)
    run.progress.line(f"equalized {equalize(artifact.model)} pairs of layers")
    return artifact


def _meeting_target(model: nn.Module, dataset: Dataset, wish: Wish, run: RunContext) -> QuantConfig:
    batches = list(images(dataset, wish.calibration, run.seed, run.device))
    probe = Probe(batches, wish.calibration, stages.validation_accuracy(dataset))
    ranked = measure_sensitivity(model, wish.quantization, probe, run.progress)
    target = (wish.recovery.target_drop or 0) / 100
    config = keep_sensitive(model, wish.quantization, ranked, probe, target)
    run.progress.line(f"kept at 8 bits: {config.keep_8bit or 'no layer'}")
    return config


def _check_target(*, lost: float, wish: Wish) -> None:
    """Hold what is delivered against what was asked: training and recovery come after the choice of bits."""
    target = wish.recovery.target_drop or 0
    if 100 * lost > target:
        raise FailedError(
            f"the drop is {100 * lost:.2f} points after {wish.calibration.mode}, --target-drop allows {target:g}; "
            "train longer, or leave out what was to recover accuracy"
        )


def _recover(floating: nn.Module, model: nn.Module, dataset: Dataset, wish: Wish, run: RunContext) -> None:
    asked = wish.recovery
    if not (asked.adaround or asked.bias_correct or asked.bn_reestimate):
        return
    batches = list(images(dataset, wish.calibration, run.seed, run.device))
    if asked.adaround:
        count = adaround(floating, model, batches, run.progress, run.seed)
        run.progress.line(f"chose the rounding of {count} layers")
    if asked.bn_reestimate:
        run.progress.line(f"estimated {reestimate_norms(model, batches)} batch norms anew")
    if asked.bias_correct:
        count = correct_biases(floating, model, batches, norms_estimated=asked.bn_reestimate)
        run.progress.line(f"corrected the mean of {count} layers")


def _set_ranges(model: nn.Module, floating: nn.Module, dataset: Dataset, wish: Wish, run: RunContext) -> None:
    asked = wish.calibration
    if asked.mode == "qat" and asked.calibrator == "minmax" and asked.calib_cache is None:
        calibrate(model, images(dataset, asked, run.seed, run.device))  # averages, as training goes on with
        return
    statistics = _statistics(model, floating, dataset, wish, run)
    set_ranges(model, statistics, asked.calibrator, asked.percentile)
    if asked.mode == "qat" and asked.calibrator != "minmax":  # training would move them to the batches' ends
        freeze_activations(model)


def _statistics(model: nn.Module, floating: nn.Module, dataset: Dataset, wish: Wish, run: RunContext) -> Statistics:
    cache = wish.calibration.calib_cache
    if cache is None:
        return collect(model, images(dataset, wish.calibration, run.seed, run.device))
    shown = list(images(dataset, wish.calibration, run.seed, run.device))
    network = _hash(floating, shown)
    if distributed.from_rank_zero(cache.exists):
        run.progress.line(f"activation statistics from {cache}")
        return load_statistics(cache, network)
    statistics = collect(model, shown)
    distributed.from_rank_zero(lambda: save_statistics(statistics, cache, network))
    run.progress.line(f"wrote {cache}")
    return statistics


def _hash(model: nn.Module, shown: list[Tensor]) -> str:
    """Return the hash of all that statistics follow from: a network's tensors, and the images it is shown."""
    found = hashlib.sha256()
    for name, tensor in [*sorted(model.state_dict().items()), *(("images", batch) for batch in shown)]:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def images(dataset: Dataset, asked: RangeConfig, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the images to calibrate on, never augmented: drawn from the training images, or from a folder."""
    split: ImageSplit = dataset.train if asked.calib_data is None else _folder(asked.calib_data, dataset)
    count = asked.calib_batches * CALIBRATION_BATCH
    for inputs, _ in eval_batches(random_subset(split, count, seed), dataset.spec, CALIBRATION_BATCH):
        yield inputs.to(device)


def _folder(place: Path, dataset: Dataset) -> ImageSplit:
    paths = list_images(place) if place.is_dir() else []
    if not paths:
        raise MicronetError(f"--calib-data {place}: no folder with images in it")
    return FileSplit.of(paths, torch.zeros(len(paths), dtype=torch.int64), dataset.spec.image_size or 0)


def _said(asked: CalibrationConfig) -> dict[str, object]:
    """Return the calibration's settings that took part, for the record."""
    said: dict[str, object] = {"mode": asked.mode, "calibrator": asked.calibrator, "calib_batches": asked.calib_batches}
    if asked.calibrator == "percentile":
        said["percentile"] = asked.percentile
    if asked.calib_data is not None:
        said["calib_data"] = str(asked.calib_data)
    return said
