"""The test images on which networks disagree, as thumbnails."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from micronet.data.split import ImageSplit
from micronet.evaluation.accuracy import Evaluation
from micronet.tasks.task import CLASSIFICATION

if TYPE_CHECKING:
    from micronet.data.dataset import Dataset

MOST = 24
ALIKE = 0.8  # share of images in the first network's class from which a network's mistakes are worth looking at
THUMBNAIL = 64  # pixels


@dataclass(frozen=True)
class Picture:
    """An image: its number in the test set, a PNG as a data URI, its class, and the class each network predicts."""

    number: int
    source: str
    truth: str
    predicted: list[str]


@dataclass(frozen=True)
class Agreement:
    """On how many images a network and the first one are right or wrong."""

    name: str
    both_right: int
    only_first: int
    only_this: int
    both_wrong: int


@dataclass(frozen=True)
class Disagreement:
    """Where networks disagree: counts for each but the first, and some of the images."""

    counts: list[Agreement]
    images: int  # on which not all predict the same class, except those left out
    pictures: list[Picture]
    left_out: list[str]  # networks that differ from the first one on more than a fifth of all images


def disagreement(
    names: Sequence[str], evaluations: Sequence[Evaluation], dataset: "Dataset", chosen: int
) -> Disagreement | None:
    """Return the images that networks classify differently; None for other tasks and for samples that are not images.

    Those that the first network gets right and the one ``chosen`` does not come first. Networks that differ from the
    first one on a fifth of all images, such as pruned ones before finetuning, are only counted.
    """
    split = dataset.test
    if dataset.task.name != CLASSIFICATION or not isinstance(split, ImageSplit) or len(names) < 2:
        return None
    labels = split.labels.numpy()
    classes = np.stack([each.classes for each in evaluations])  # (networks, images)
    right = classes == labels
    counts = [
        Agreement(
            name,
            both_right=int((right[0] & own).sum()),
            only_first=int((right[0] & ~own).sum()),
            only_this=int((~right[0] & own).sum()),
            both_wrong=int((~right[0] & ~own).sum()),
        )
        for name, own in zip(names[1:], right[1:], strict=True)
    ]
    alike = (classes == classes[0]).mean(1) >= ALIKE
    differing = np.flatnonzero((classes[alike] != classes[0]).any(0))
    lost, won = right[0] & ~right[chosen], ~right[0] & right[chosen]
    first = differing[np.argsort(-2 * lost[differing].astype(int) - won[differing], kind="stable")][:MOST]
    texts = dataset.classes or [str(number) for number in range(int(max(classes.max(), labels.max())) + 1)]
    images: Iterable[torch.Tensor] = split.images(torch.from_numpy(first)) if len(first) else []
    pictures = [
        Picture(int(number), _png(image), texts[labels[number]], [texts[each] for each in classes[:, number]])
        for number, image in zip(first, images, strict=True)
    ]
    left_out = [name for name, kept in zip(names, alike, strict=True) if not kept]
    return Disagreement(counts, len(differing), pictures, left_out)


def _png(image: torch.Tensor) -> str:
    """Return an image (C, H, W) uint8 as the data URI of a PNG, at most THUMBNAIL pixels wide."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    if pixels.shape[2] not in (1, 3):
        pixels = pixels[:, :, :1]
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
