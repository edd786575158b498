"""The quantize command's work: a float artifact, however it is got, through calibration and training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from micronet.artifact import Artifact, load
from micronet.cli import stages
from micronet.cli.options import DataOptions, ModelOptions
from micronet.data.batches import plain_batches
from micronet.data.dataset import Dataset
from micronet.data.folder import list_images
from micronet.data.split import FileSplit, Split, draw
from micronet.errors import MicronetError
from micronet.files import check_target, file_hash
from micronet.history import StageRecord, check_order
from micronet.quantization.calibrate import calibrate, freeze, frozen, observing
from micronet.quantization.calibration_config import CalibrationConfig
from micronet.quantization.config import QuantConfig
from micronet.quantization.ptq import Statistics, collect, load_statistics, save_statistics, set_ranges
from micronet.quantization.quantize import quantize_model
from micronet.training import Procedure, Run, check_fit, fit_artifact
from micronet.training_config import TrainConfig

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Wish:
    """What is asked of the command. ``path``: the artifact's file, which statistics for reuse are tied to."""

    quantization: QuantConfig
    calibration: CalibrationConfig
    training: TrainConfig
    data: DataOptions
    path: Path


def float_artifact(model: ModelOptions, data: DataOptions, run: Run) -> tuple[Artifact, Path]:
    """Train the network that there is no artifact of yet, and keep it beside the output; return it and its path."""
    path = run.output.with_name(f"{run.output.stem}-float.safetensors")
    if run.resume and path.exists():
        artifact = load(path, model.model if ":" in model.name else None)
        if artifact.spec.name != model.name:
            raise MicronetError(f"{path} is a {artifact.spec.name}, not a {model.name}; give another -o, or --force")
        return artifact, path
    check_target(path, run.force)
    artifact = stages.train(model, data, TrainConfig(), replace(run, output=path))
    stages.keep(artifact, path)
    run.progress.line(f"wrote {path}  test accuracy {artifact.metrics['test_accuracy']:.2%}")
    return artifact, path


def quantize(artifact: Artifact, wish: Wish, run: Run) -> Artifact:
    """Place quantizers, set their ranges from images that are not augmented, then (QAT) train with them."""
    check_order(artifact.history, "quantize")
    dataset = stages.open_data(wish.data, artifact, run.seed)
    check_fit(artifact.model, dataset)
    model, record = quantize_model(artifact.model, wish.quantization)
    model.to(run.device)
    training = wish.training if wish.calibration.mode == "qat" else replace(wish.training, epochs=0)
    _set_ranges(model, dataset, wish, run)
    began = replace(artifact, model=model, history=[*artifact.history, record])
    fitted = fit_artifact(began, dataset, training, run, Procedure(observing))
    asked = {**wish.quantization.to_json(), **_said(wish.calibration)}
    if training.epochs:
        asked |= training.to_json()
    return replace(fitted, history=[*artifact.history, StageRecord(record.stage, asked, record.result)])


def qaft(artifact: Artifact, wish: Wish, run: Run) -> Artifact:
    """Train a quantized artifact with its ranges and batch norms frozen."""
    if not any(record.stage == "quantize" for record in artifact.history):
        raise MicronetError(f"--mode qaft trains a quantized artifact; first: micronet quantize {wish.path} --mode ptq")
    check_order(artifact.history, "finetune")
    dataset = stages.open_data(wish.data, artifact, run.seed)
    freeze(artifact.model)
    procedure = Procedure(frozen, config={"mode": "qaft"})
    return stages.fit_stage("finetune", artifact, dataset, wish.training, run, procedure)


def _set_ranges(model: nn.Module, dataset: Dataset, wish: Wish, run: Run) -> None:
    asked = wish.calibration
    if asked.mode == "qat" and asked.calibrator == "minmax" and asked.calib_cache is None:
        calibrate(model, _images(dataset, asked, run))  # averages, as training goes on with
        return
    statistics = _statistics(model, dataset, wish, run)
    set_ranges(model, statistics, asked.calibrator, asked.percentile)


def _statistics(model: nn.Module, dataset: Dataset, wish: Wish, run: Run) -> Statistics:
    cache = wish.calibration.calib_cache
    if cache is None:
        return collect(model, _images(dataset, wish.calibration, run))
    network = file_hash(wish.path)
    if cache.exists():
        run.progress.line(f"activation statistics from {cache}")
        return load_statistics(cache, network)
    statistics = collect(model, _images(dataset, wish.calibration, run))
    save_statistics(statistics, cache, network)
    run.progress.line(f"wrote {cache}")
    return statistics


def _images(dataset: Dataset, asked: CalibrationConfig, run: Run) -> Iterator[Tensor]:
    """Yield the images to calibrate on, never augmented: drawn from the training images, or from a folder."""
    split: Split = dataset.train if asked.calib_data is None else _folder(asked.calib_data, dataset)
    count = asked.calib_batches * CALIBRATION_BATCH
    batches = plain_batches(draw(split, count, run.seed), dataset.spec, CALIBRATION_BATCH)
    for done, (inputs, _) in enumerate(islice(batches, asked.calib_batches), 1):
        run.progress.step("calibrating", done, asked.calib_batches)
        yield inputs.to(run.device)


def _folder(place: Path, dataset: Dataset) -> Split:
    paths = list_images(place) if place.is_dir() else []
    if not paths:
        raise MicronetError(f"--calib-data {place}: no folder with images in it")
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), dataset.spec.image_size or 0)


def _said(asked: CalibrationConfig) -> dict[str, object]:
    """Return the calibration's settings that took part, for the record."""
    said: dict[str, object] = {"mode": asked.mode, "calibrator": asked.calibrator, "calib_batches": asked.calib_batches}
    if asked.calibrator == "percentile":
        said["percentile"] = asked.percentile
    if asked.calib_data is not None:
        said["calib_data"] = str(asked.calib_data)
    return said
