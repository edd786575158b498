"""The quantize command's work: a float artifact, however it is got, through calibration and training."""

from dataclasses import replace

from micronet.artifact import Artifact, load
from micronet.cli import stages
from micronet.cli.options import DataOptions, ModelOptions
from micronet.data.batches import plain_batches
from micronet.data.split import draw
from micronet.errors import MicronetError
from micronet.files import check_target
from micronet.history import StageRecord
from micronet.quantization.calibrate import calibrate, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.training import Procedure, Run, check_fit, fit_artifact
from micronet.training_config import TrainConfig

CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 64


def float_artifact(model: ModelOptions, data: DataOptions, run: Run) -> Artifact:
    """Train the network that there is no artifact of yet, and keep it beside the output."""
    path = run.output.with_name(f"{run.output.stem}-float.safetensors")
    if run.resume and path.exists():
        artifact = load(path, model.model if ":" in model.name else None)
        if artifact.spec.name != model.name:
            raise MicronetError(f"{path} is a {artifact.spec.name}, not a {model.name}; give another -o, or --force")
        return artifact
    check_target(path, run.force)
    artifact = stages.train(model, data, TrainConfig(), replace(run, output=path))
    stages.keep(artifact, path)
    run.progress.line(f"wrote {path}  test accuracy {artifact.metrics['test_accuracy']:.2%}")
    return artifact


def quantize(artifact: Artifact, config: QuantConfig, training: TrainConfig, data: DataOptions, run: Run) -> Artifact:
    """Place quantizers, set their ranges from images that are not augmented, then train with them."""
    dataset = stages.open_data(data, artifact, run.seed)
    check_fit(artifact.model, dataset)
    model, record = quantize_model(artifact.model, config)
    model.to(run.device)
    chosen = draw(dataset.train, CALIBRATION_IMAGES, run.seed)
    batches = plain_batches(chosen, dataset.spec, CALIBRATION_BATCH)
    calibrate(model, (inputs.to(run.device) for inputs, _ in batches))
    began = replace(artifact, model=model, history=[*artifact.history, record])
    fitted = fit_artifact(began, dataset, training, run, Procedure(observing))
    trained = StageRecord(record.stage, {**config.to_json(), **training.to_json()}, record.result)
    return replace(fitted, history=[*artifact.history, trained])
