"""Networks, data, example inputs and calibration for the stages. Imports torch, so import it late."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact
from micronet.core.image_size import parse_size, sides
from micronet.core.progress import Progress
from micronet.data.arrays import open_inputs
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset, DataSpec, images_of
from micronet.data.image_files import FileSplit, list_images
from micronet.data.load import load_data
from micronet.data.memory import MemoryData
from micronet.data.samples import example_of
from micronet.data.split import Split, random_subset
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import check_scores, evaluate, evaluating, reason_of
from micronet.evaluation.network import Predictor
from micronet.graph.user_lines import error_line
from micronet.models.build import ModelSpec, accepted_args, build_model, make_spec
from micronet.models.calling import take_in_order
from micronet.models.device import Example, Inputs, as_inputs, batch_length, contiguous, head, to_device
from micronet.models.modes import eval_mode, state_kept
from micronet.quantization.config import CALIBRATION_BATCH, RangeConfig
from micronet.quantization.histogram import Statistics, load_statistics, save_statistics
from micronet.quantization.synthetic import synthesize_images
from micronet.stages.config import DataConfig, ModelConfig
from micronet.stages.words import describe_inputs
from micronet.tasks.task import describe
from micronet.training.config import RunContext
from micronet.training.distributed import from_rank_zero

DEFAULT_DATA = "digits"
DEFAULT_SHAPE = (3, 224, 224)  # of torchvision's classification networks


def open_data(config: DataConfig, artifact: Artifact | None = None, seed: int = 1) -> Dataset:
    """Open the data named, or those an artifact remembers; without an artifact, the default data."""
    like = DataSpec(name=DEFAULT_DATA, seed=seed) if artifact is None else DataSpec.from_json(artifact.data)
    network = None if artifact is None else artifact.model
    data = load_data(
        config.data, image_size=config.image_size, limit=config.limit, like=like, task=config.task, network=network
    )
    if artifact is not None and data.inputs is not None:
        take_in_order(artifact.model, data.inputs)
    if artifact is None or like.channels is not None or like.mean is not None:
        return data
    return with_grey(data, like, artifact.model, config)


def with_grey(data: Dataset, like: DataSpec, model: nn.Module, config: DataConfig) -> Dataset:
    """Return the data with one channel if the image files are grey and the network takes images of one channel."""
    if not data.is_grey or not _takes_grey(model, images_of(data.train).image_shape):
        return data
    like = replace(like, channels=1)
    return load_data(config.data, image_size=config.image_size, limit=config.limit, like=like, task=config.task)


def _takes_grey(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    try:
        with eval_mode(model), torch.no_grad():
            model(*as_inputs(model, torch.zeros(1, 1, *shape[1:])))
    except Exception:  # the user's forward may raise anything
        return False
    return True


def open_test_data(config: DataConfig, like: DataSpec, network: nn.Module | None = None) -> Dataset:
    """Open the data named, or those a spec remembers, with all test images whatever the training's limit was.

    ``network``: one that takes the data, if there is one in torch; data in memory are for testing as a whole.
    """
    like = replace(like, limit=None)
    return load_data(
        config.data, image_size=config.image_size, limit=config.limit, like=like, task=config.task, network=network,
        testing=True,
    )  # fmt: skip


def export_batches(artifact: Artifact, config: DataConfig, count: int) -> tuple[Artifact, Callable[[], Iterator[Any]]]:
    """Return the artifact with its data, and a function that yields batches of ``count`` test images (N, C, H, W).

    Batches are tuples if the network has several inputs.

    Raises:
        MicronetError: The network does not take the images.
    """
    if isinstance(config.data, MemoryData):  # the inputs alone; the file keeps the artifact's record of its data
        given = [to_device(batch, torch.device("cpu")) for batch in config.data.inputs(artifact.model)]
        for batch in {describe(batch): batch for batch in reversed(given)}.values():
            check_accepts(artifact.model, batch)
        return artifact, lambda: _heads(given, count)
    dataset = open_test_data(config, DataSpec.from_json(artifact.data))
    chosen = random_subset(dataset.test, count, dataset.spec.seed)
    if dataset.inputs is not None:
        take_in_order(artifact.model, dataset.inputs)

    def batches() -> Iterator[Any]:
        return (contiguous(inputs) for inputs, _ in eval_batches(chosen, dataset.spec))

    with evaluating(artifact.model) as predict:
        check_scores(predict, head(next(batches()), 1), dataset.spec, task=dataset.task)
    return replace(artifact, data=dataset.spec.to_json()), batches


def _heads(batches: list[Any], count: int) -> Iterator[Any]:
    """Yield the first batches, up to ``count`` samples."""
    for batch in batches:
        if count <= 0:
            return
        yield head(batch, count)
        count -= batch_length(batch)


def new_fitting(config: ModelConfig, data: DataConfig, seed: int) -> tuple[Artifact, Dataset]:
    """Open the data named, and build a network that fits them; grey image files have one channel if that fits."""
    dataset = open_data(data, seed=seed)
    if dataset.is_grey:
        like = DataSpec(name=DEFAULT_DATA, seed=seed)
        artifact = new_artifact(config, replace(dataset.spec, channels=1), seed)
        grey = with_grey(dataset, like, artifact.model, data)
        if grey is not dataset:
            return artifact, grey
    artifact = new_artifact(config, dataset.fitting_spec, seed)
    take_in_order(artifact.model, dataset.inputs)
    return artifact, dataset


def new_artifact(config: ModelConfig, spec: DataSpec, seed: int) -> Artifact:
    """Build a network that fits the data, with initial weights drawn from the seed."""
    described = make_spec(config.name, config.arguments)
    described = replace(described, args={**_fitting(described, spec, config.width), **described.args})
    torch.manual_seed(seed)
    return Artifact(build_model(described, trusted=True), described, [])


def image_shape(artifact: Artifact) -> tuple[int, int, int] | None:
    """Return the (C, H, W) of the images that an artifact remembers, or None."""
    spec = DataSpec.from_json(artifact.data)
    if spec.channels is None or spec.image_size is None:
        return None
    return spec.channels, *sides(spec.image_size)


def example_input(artifact: Artifact, input_shape: str | None = None) -> Example:
    """Return two random inputs of the shape given (``C,H,W``), remembered, or usual for image classifiers."""
    remembered = DataSpec.from_json(artifact.data).inputs
    if remembered is not None and input_shape is None:
        return example_of(remembered)
    shape = image_shape(artifact) or DEFAULT_SHAPE
    if input_shape is not None:
        parts = input_shape.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and 0 < int(part) < 2**15 for part in parts):
            raise MicronetError(
                f"--input-shape is {input_shape!r}; expected channels,height,width, for example 3,224,224"
            )
        shape = int(parts[0]), int(parts[1]), int(parts[2])
    return torch.rand(2, *shape)


def validation_accuracy(dataset: Dataset, original: nn.Module | None = None) -> Callable[[nn.Module], float]:
    """Return a function from a network to its accuracy on the validation images, 0..1.

    Of other tasks it is the main metric, negated if less is better. ``original``: the network that agreement is with.
    """
    data = dataset if original is None else dataset.with_reference(reference_of(original))

    def accuracy(model: nn.Module) -> float:
        with evaluating(model) as predict:
            batches = data.referenced(eval_batches(data.validation, data.spec))
            return data.task.quality(evaluate(predict, batches, task=data.task).metrics)

    return accuracy


def reference_of(model: nn.Module) -> Predictor:
    """Return a predictor that runs a network in eval mode, whatever mode it is left in."""

    def predict(inputs: Any) -> Any:
        with evaluating(model) as run:
            return run(inputs)

    return predict


def _fitting(spec: ModelSpec, data: DataSpec, width: float | None) -> dict[str, Any]:
    """Return the factory arguments that fit a network to data."""
    classes = len(data.classes or [])
    known = {"num_classes": classes, "in_channels": data.channels, "image_size": data.image_size}
    offers: dict[str, Any] = {name: value for name, value in known.items() if value}
    if width is not None:
        offers["width"] = width
    taken = accepted_args(spec, offers)
    if width is not None and "width" not in taken:
        raise MicronetError(f"--width only applies to built-in networks; for {spec.name}, use --model-args")
    return {"num_classes": classes} if spec.name.startswith("torchvision:") and classes else taken


def calibration_batches(
    dataset: Dataset, config: RangeConfig, seed: int, device: torch.device | None = None
) -> Iterator[Any]:
    """Yield batches of images (N, C, H, W) or other inputs, never augmented, to calibrate on."""
    split = dataset.train if config.calib_data is None else _folder(config.calib_data, dataset)
    images = random_subset(split, config.batches * CALIBRATION_BATCH, seed)
    for inputs, _ in eval_batches(images, dataset.spec, CALIBRATION_BATCH):
        yield to_device(contiguous(inputs), device)


def check_accepts(model: nn.Module, batch: Any) -> None:
    """Raise MicronetError if a network does not take a batch of inputs; it keeps its state, such as empty caches."""
    device = next(model.parameters(), torch.empty(0)).device
    given = to_device(Inputs(batch if isinstance(batch, tuple) else (batch,)), device)
    try:
        with eval_mode(model), torch.no_grad():
            modules = {*model.modules()}
            with state_kept(model):
                model(*given)
                builds = modules != {*model.modules()}
            if builds:  # the layers that a first forward builds stay
                model(*given)
    except Exception as error:  # the user's forward may raise anything
        refused = f"{describe(batch)}{error_line(error)}"
        raise MicronetError(f"the network does not accept {refused}: {reason_of(error)}") from error


def generated_batches(artifact: Artifact, data: DataConfig, config: RangeConfig, run: RunContext) -> list[Tensor]:
    """Return batches of images (N, C, H, W) generated from the statistics of a network's batch norms.

    Raises MicronetError if the network takes other inputs: nothing is known of their values.
    """
    cure = "pass inputs with --calib-data, or a data set with --data"
    if inputs := DataSpec.from_json(artifact.data).inputs:
        raise MicronetError(
            f"--calib-data none generates images, but this network takes {describe_inputs(inputs)}; {cure}"
        )
    shape = image_shape(artifact) or DEFAULT_SHAPE
    if (size := parse_size(data.image_size)) is not None:
        shape = shape[0], *sides(size)
    model = artifact.model.to(run.device)
    try:
        check_accepts(model, torch.zeros(2, *shape, device=run.device))
    except MicronetError as error:
        raise MicronetError(f"--calib-data none generates images, but {error}; {cure}") from error
    made = synthesize_images(model, shape, config.batches, run.seed, run.progress)
    run.progress.line(
        f"generated {config.batches * CALIBRATION_BATCH} images; difference between their statistics and those "
        f"of the batch norms: {made.before:.3f} -> {made.after:.3f}"
    )
    return made.batches


def cached(
    cache: Path | None, depends_on: Iterable[bytes], collect: Callable[[], Statistics], progress: Progress
) -> Statistics:
    """Return statistics from a cache if it exists; otherwise collect them, and write the cache if one is named.

    Args:
        cache: The file.
        depends_on: The bytes of the network and of the inputs; a cache of others is refused.
        collect: Collects the statistics.
        progress: Where to report what is read or written.
    """
    if cache is None:
        return collect()
    digest = hashlib.sha256()
    for part in depends_on:
        digest.update(part)
    if from_rank_zero(cache.exists):
        progress.line(f"read activation statistics from {cache}")
        return load_statistics(cache, digest.hexdigest())
    statistics = collect()
    from_rank_zero(lambda: save_statistics(statistics, cache, digest.hexdigest()))
    progress.line(f"wrote {cache}")
    return statistics


def _folder(place: Path, dataset: Dataset) -> Split:
    if dataset.spec.inputs is not None:
        if source := open_inputs(place):
            return source.train()
        raise MicronetError(
            f"--calib-data {place} holds no inputs of this network, {describe_inputs(dataset.spec.inputs)}; specify an "
            ".npz file with one array per input or a folder of .npy files, or drop --calib-data"
        )
    paths = list_images(place) if place.is_dir() else []
    if not paths:
        raise MicronetError(f"--calib-data {place} is not a folder of images; specify one, or drop --calib-data")
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), dataset.spec.image_size or 0)
