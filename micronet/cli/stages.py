"""What the commands that train share: putting a network, data and a run together. Imports torch, so import it late."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact, load, save
from micronet.artifact.history import StageRecord, check_order
from micronet.cli import console
from micronet.cli.options import DataOptions, ModelOptions, OutputOptions, RunConfig, parse_json_object
from micronet.core.files import check_output_path
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.load import load_data
from micronet.data.split import random_subset
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import check_scores, evaluate, evaluating
from micronet.evaluation.cost import count_macs
from micronet.models.build import ModelSpec, accepted_args, build_model, make_spec
from micronet.models.device import pick_device
from micronet.runtimes.config import CodeOptions
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint
from micronet.training.config import TrainConfig
from micronet.training.loop import NO_HOOKS, RunContext, TrainHooks, fit_artifact

DEFAULT_DATA = "digits"
USUAL_SHAPE = (3, 224, 224)  # of torchvision's networks


def make_run(path: Path, running: RunConfig, output: OutputOptions, progress: Progress) -> RunContext:
    """Return where and how a training runs."""
    device = pick_device(distributed.local_device(running.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return RunContext(
        output=path,
        device=device,
        seed=running.seed,
        resume=running.resume,
        force=output.force,
        progress=progress,
        deadline=math.inf if running.max_time is None else time.monotonic() + 60 * running.max_time,
        checkpoint_minutes=running.checkpoint_minutes,
        compiled=running.compile,
    )


def open_artifact(path: Path, code: CodeOptions, stage: str | None = None) -> Artifact:
    """Load an artifact the way the user says its code may be run; for a ``stage``, where that may come next."""
    artifact = load(path, code.model, trust_code=code.trust_code)
    if stage is not None:
        check_order(artifact.history, stage)
    return artifact


def open_data(options: DataOptions, artifact: Artifact | None = None, seed: int = 1) -> Dataset:
    """Open the data named, or those an artifact remembers; without an artifact, the default ones."""
    like = DataSpec(name=DEFAULT_DATA, seed=seed) if artifact is None else DataSpec.from_json(artifact.data)
    return load_data(options.data, image_size=options.image_size, limit=options.limit, like=like)


def open_to_test(options: DataOptions, like: DataSpec) -> Dataset:
    """Open the data named, or those a spec remembers: all test images, on however few the network was trained."""
    return load_data(options.data, image_size=options.image_size, limit=options.limit, like=replace(like, limit=None))


def open_to_export(
    path: Path, code: CodeOptions, options: DataOptions, count: int
) -> tuple[Artifact, Callable[[], Iterator[Tensor]]]:
    """Return an artifact, and what gives batches of ``count`` test images to hold an exported file against.

    Raises MicronetError where its network does not take them.
    """
    artifact = open_artifact(path, code)
    dataset = open_to_test(options, DataSpec.from_json(artifact.data))
    chosen = random_subset(dataset.test, count, dataset.spec.seed)

    def batches() -> Iterator[Tensor]:
        return (images for images, _ in eval_batches(chosen, dataset.spec))

    with evaluating(artifact.model) as predict:
        check_scores(predict, next(batches())[:1], len(dataset.spec.classes or []))
    return replace(artifact, data=dataset.spec.to_json()), batches


def new_artifact(options: ModelOptions, spec: DataSpec, seed: int) -> Artifact:
    """Build a network for data, with the initial weights that the seed gives."""
    described = make_spec(options.name, parse_json_object(options.model_args, "model_args"))
    args = {**_fitting(described, spec, options.width), **described.args}
    described = replace(described, args=args)
    torch.manual_seed(seed)
    return Artifact(build_model(described, trusted=True), described, [])


def train(model: ModelOptions, data: DataOptions, training: TrainConfig, run: RunContext) -> Artifact:
    """Train a network from scratch; the artifact's history is that."""
    dataset = open_data(data, seed=run.seed)
    artifact = new_artifact(model, dataset.spec, run.seed)
    return fit_stage("train", artifact, dataset, training, run)


def fit_stage(
    stage: str,
    artifact: Artifact,
    dataset: Dataset,
    training: TrainConfig,
    run: RunContext,
    procedure: TrainHooks = NO_HOOKS,
) -> Artifact:
    """Train an artifact and record that as a stage."""
    fitted = fit_artifact(artifact, dataset, training, run, procedure)
    return fitted.after(StageRecord(stage, {**procedure.config, **training.to_json()}))


def check_output(path: Path, output: OutputOptions, running: RunConfig) -> None:
    """Raise MicronetError where a training's result cannot be written, or is there already."""

    def check() -> None:
        if running.resume and path.exists() and not output.force:
            raise MicronetError(f"{path} is finished, so there is nothing to resume; --force trains it anew")
        check_output_path(path, output.force)

    distributed.from_rank_zero(check)


def keep(artifact: Artifact, path: Path) -> None:
    """Save what a training made, and only then let go of the checkpoint that could have brought it back."""

    def write() -> None:
        save(artifact, path)
        Checkpoint.beside(path, {}).remove()

    distributed.from_rank_zero(write)


def report(artifact: Artifact, path: Path, output: OutputOptions) -> None:
    """Print where a saved artifact is and how good."""
    summary: dict[str, Any] = {"output": str(path), "size_bytes": path.stat().st_size, **artifact.metrics}
    if output.json:
        console.print_json(summary)
    elif not output.quiet:
        accuracy = artifact.metrics.get("test_accuracy")
        images = artifact.metrics.get("test_images", 0)
        tested = f"  test accuracy {accuracy:.2%} of {images:,} images" if accuracy is not None else ""
        console.print_line(f"wrote {path}  {summary['size_bytes']:,} bytes{tested}")


def image_shape(artifact: Artifact) -> tuple[int, int, int] | None:
    """Return (C, H, W) of the images an artifact remembers, or None where it knows of none."""
    spec = DataSpec.from_json(artifact.data)
    if spec.channels is None or spec.image_size is None:
        return None
    return spec.channels, spec.image_size, spec.image_size


def example_input(artifact: Artifact, asked: str | None = None) -> Tensor:
    """Return two random images of the shape asked for (``C,H,W``), remembered, or usual for what the network reads."""
    shape = image_shape(artifact) or USUAL_SHAPE
    if asked is not None:
        parts = asked.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise MicronetError(f"--input-shape is {asked!r}; allowed: channels,height,width, for example 3,224,224")
        shape = int(parts[0]), int(parts[1]), int(parts[2])
    return torch.rand(2, *shape)


def validation_accuracy(dataset: Dataset) -> Callable[[nn.Module], float]:
    """Return a function that evaluates a network on the validation images."""

    def accuracy(model: nn.Module) -> float:
        with evaluating(model) as predict:
            return evaluate(predict, eval_batches(dataset.validation, dataset.spec)).accuracy

    return accuracy


def sizes(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return a network's parameters and its multiply-accumulates for one image of a batch's shape."""
    macs = count_macs(model, images[:1])
    return {"params": sum(parameter.numel() for parameter in model.parameters()), "macs": macs}


def _fitting(spec: ModelSpec, data: DataSpec, width: float | None) -> dict[str, Any]:
    """Return the arguments that fit a network to data: for our own networks all that they take."""
    classes = len(data.classes or [])
    offers = {"num_classes": classes, "in_channels": data.channels, "image_size": data.image_size}
    if width is not None:
        offers["width"] = width  # type: ignore[assignment]
    taken = accepted_args(spec, offers)
    if width is not None and "width" not in taken:
        raise MicronetError(f"--width works for micronet's own networks; {spec.name} takes --model-args")
    if spec.name.startswith("torchvision:"):
        return {"num_classes": classes}
    return taken
