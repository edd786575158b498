"""Measure semantic segmentation: pixel accuracy and mean intersection over union (IoU), averaged over image sizes.

An image is scored at every size. The scores are resampled bilinearly to the size of the label map, and their softmax is
averaged. Pixels with a negative label or label 255 are ignored. Any predictor that returns (N, K, h, w) will do.

Both figures are those of the task segmentation (``tasks.segmentation``), which measures at one size.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from micronet.core.progress import Progress, Silent
from micronet.data.batches import Normalize
from micronet.data.dataset import IMAGENET, DataSpec
from micronet.data.image_files import open_image
from micronet.data.masks import IGNORED, Pair
from micronet.errors import MicronetError
from micronet.tasks.segmentation import Overlap

SIDE_MULTIPLE = 8  # sides are rounded to it: segmentation networks score at 1/8 of the image's size
LABEL_MODES = ("L", "P", "I", "I;16")  # Pillow's modes with one integer per pixel

Size = int | tuple[int, int]  # the shorter side, or height and width
Predict = Callable[[NDArray[np.float32]], Any]  # (N, C, H, W) -> scores (N, K, h, w)


class Segmentation(NamedTuple):
    """Figures over all labeled pixels, 0..1."""

    pixel_accuracy: float
    mean_iou: float
    class_iou: list[float | None]  # None for a class that does not occur
    images: int
    agreement: float | None  # share of pixels that a reference puts into the same class


def evaluate_segmentation(
    predict: Predict,
    pairs: Sequence[Pair],
    sizes: Sequence[Size],
    spec: DataSpec,
    progress: Progress | None = None,
    reference: Predict | None = None,
) -> Segmentation:
    """Measure a segmentation network, with its probabilities averaged over image sizes.

    Args:
        spec: How images are normalized; ImageNet's way if it does not say.
        reference: A second network with which the first is compared.

    Raises:
        MicronetError: A file is unreadable, a label is out of range, or no pixel is labeled.
    """
    progress = progress or Silent()
    matrix: Any = 0
    same = total = 0
    for index, pair in enumerate(pairs):
        progress.step("segmenting", index, len(pairs))
        image, labels = read_image(pair.image), read_labels(pair.label)
        scores = multi_scale_scores(predict, image, labels.shape, sizes, spec)
        classes = scores.argmax(0)
        matrix = matrix + _confusion(labels, classes, len(scores), pair.label)
        if reference is not None:
            same += int((multi_scale_scores(reference, image, labels.shape, sizes, spec).argmax(0) == classes).sum())
            total += classes.size
    if not np.any(matrix):
        raise MicronetError("the label maps contain no labeled pixels (all are negative or 255); check the labels")
    accuracy, iou = measures(matrix)
    present = [value for value in iou if value is not None]
    return Segmentation(accuracy, float(np.mean(present)), iou, len(pairs), same / total if total else None)


def multi_scale_scores(
    predict: Predict,
    image: Tensor,
    shape: tuple[int, int],
    sizes: Sequence[Size],
    spec: DataSpec,
) -> NDArray[np.float32]:
    """Return the class probabilities (K, height, width) of an image (C, H, W) uint8, averaged over sizes."""
    probabilities = []
    for size in sizes:
        scores = predict(prepare(image, size, spec))
        if scores.ndim != 4:
            raise MicronetError(
                f"a segmentation network must return scores of shape (N, K, h, w), but got {scores.shape}"
            )
        full = F.interpolate(torch.from_numpy(scores), shape, mode="bilinear", align_corners=False)
        probabilities.append(full[0].softmax(0))
    return (sum(probabilities[1:], probabilities[0]) / len(sizes)).numpy()


def measures(matrix: NDArray[np.int64]) -> tuple[float, list[float | None]]:
    """Return pixel accuracy and the IoU per class from a confusion matrix (K labels, K predictions)."""
    meter = Overlap()
    meter.totals = torch.from_numpy(matrix).double()
    iou = [None if value != value else value for value in meter.class_iou().tolist()]
    return meter.compute()["pixel_accuracy"], iou


def prepare(image: Tensor, size: Size, spec: DataSpec) -> NDArray[np.float32]:
    """Resample and normalize an image (C, H, W) uint8 to (1, C, h, w) float32."""
    pixels = F.interpolate(image[None].float(), scaled(image.shape[1:], size), mode="bilinear", antialias=True)
    if spec.channels == 1:
        pixels = pixels.mean(1, keepdim=True)
    if not (spec.mean and spec.std):
        spec = DataSpec(mean=IMAGENET["mean"], std=IMAGENET["std"])  # as segmentation networks usually have
    normalized: NDArray[np.float32] = Normalize(spec)(pixels).contiguous().numpy()
    return normalized


def scaled(shape: Sequence[int], size: Size) -> tuple[int, int]:
    """Return the height and width at which an image (H, W) is scored."""
    if isinstance(size, tuple):
        return size
    height, width = (max(1, round(side * size / min(shape) / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in shape)
    return height, width


def parse_sizes(text: str) -> list[Size]:
    """Parse ``256,400x608``; raise MicronetError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", part) for part in parts):
        raise MicronetError(
            f"--sizes is {text!r}; expected lengths of the shorter side or HEIGHTxWIDTH, such as 256,400x608"
        )
    sides = [tuple(map(int, part.split("x"))) for part in parts]
    return [each if len(each) == 2 else each[0] for each in sides]


def read_image(path: Path) -> Tensor:
    """Read an image as (3, H, W) uint8."""
    with open_image(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_labels(path: Path) -> NDArray[np.int64]:
    """Read a label map as (H, W) int64, one label per pixel; a palette image gives its indices."""
    with open_image(path) as image:
        if image.mode not in LABEL_MODES:
            raise MicronetError(f"{path} is not a label map: its pixel format is {image.mode}; expected integers")
        return np.array(image).astype(np.int64)


def _confusion(labels: NDArray[np.int64], classes: NDArray[np.int64], count: int, path: Path) -> NDArray[np.int64]:
    valid = (labels >= 0) & (labels != IGNORED)
    highest = int(labels[valid].max(initial=0))
    if highest >= count:
        raise MicronetError(
            f"{path} has label {highest}, but the network only has {count} classes, 0 to {count - 1}; fix the label map"
        )
    pairs: NDArray[np.int64] = np.bincount(labels[valid] * count + classes[valid], minlength=count * count)
    return pairs.reshape(count, count)
