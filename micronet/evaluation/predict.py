"""Classify image files: the classes of every image, the most likely first."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from micronet.core.progress import Progress
from micronet.data.batches import Normalize
from micronet.data.dataset import DataSpec
from micronet.data.image_files import decode, list_images
from micronet.data.split import channels_first
from micronet.errors import FailedError, MicronetError
from micronet.evaluation.accuracy import check_scores, run_batch
from micronet.evaluation.network import Network
from micronet.tasks.task import CLASSIFICATION, first_output

BATCH = 32


class Ranked(NamedTuple):
    """A class and its probability, the softmax of the network's scores."""

    name: str
    score: float


class Prediction(NamedTuple):
    """The prediction for an image file: all classes, the most likely first."""

    image: Path
    classes: list[Ranked]


def predict(network: Network, places: list[Path], name: str, progress: Progress) -> list[Prediction]:
    """Run a network over image files and folders, prepared like its training images.

    ``name``: what error messages call the network. Raises MicronetError if a file is not a readable image or the
    network does not record how images are prepared, FailedError if the scores are not finite.
    """
    spec = network.data
    if spec is not None and spec.task != CLASSIFICATION:
        raise MicronetError(f"{name} is for the task {spec.task}, but predict only classifies images")
    if spec is not None and spec.inputs is not None:
        raise MicronetError(f"{name} takes other inputs than images, but predict only classifies images")
    if spec is None or None in (spec.image_size, spec.mean, spec.std, spec.classes):
        raise MicronetError(
            f"{name} does not record its preprocessing and classes; recreate it with micronet train, or with micronet "
            "import --data"
        )
    paths = [path for place in places for path in _images(place)]
    found: list[Prediction] = []
    for start in range(0, len(paths), BATCH):
        found += _predict_batch(network, spec, paths[start : start + BATCH], name)
        progress.step("predicting", len(found), len(paths))
    return found


def _predict_batch(network: Network, spec: DataSpec, paths: list[Path], name: str) -> Iterator[Prediction]:
    classes = spec.classes or []
    images = channels_first(torch.stack([decode(path, spec.image_size or 0) for path in paths]))
    if spec.channels == 1:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    inputs = Normalize(spec)(images)
    check_scores(network, inputs[:1], spec, name)
    probabilities = first_output(run_batch(network, inputs.contiguous())).softmax(1)
    if not probabilities.isfinite().all():
        raise FailedError(f"{name} outputs NaN or infinite scores; its weights are corrupted, or training diverged")
    for path, row in zip(paths, probabilities, strict=True):
        order = row.argsort(descending=True, stable=True).tolist()
        yield Prediction(path, [Ranked(classes[index], float(row[index])) for index in order])


def _images(place: Path) -> list[Path]:
    if not place.exists():
        raise MicronetError(f"{place} does not exist; pass image files or folders of images")
    if not place.is_dir():
        return [place]
    found = list_images(place)
    if not found:
        raise MicronetError(f"{place} contains no images; pass image files or folders of images")
    return found
