"""Semantic segmentation: class scores for every pixel, cross-entropy, pixel accuracy and mean intersection over union.

Data are folders ``train/``, ``test/`` and perhaps ``val/`` with ``images/NAME.jpg`` and ``masks/NAME.png``, whose
pixels are class numbers; 255 is ignored.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from micronet.core.image_size import ImageSize
from micronet.data.dataset import DataSource, DataSpec
from micronet.data.masks import IGNORED, find_class, open_masks
from micronet.errors import MicronetError
from micronet.tasks.task import OTHER_TASKS, Outputs, Task, class_numbers, count_classes, describe, first_output


class Overlap:
    """One confusion matrix over all labeled pixels, (K labels, K predictions)."""

    def __init__(self) -> None:
        self.totals = torch.zeros(0, 0, dtype=torch.float64)  # ranks add theirs up

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Add scores (N, K, h, w), resampled to the labels' size, and labels (N, H, W)."""
        scores = resampled(first_output(outputs), targets)
        self.add(scores.argmax(1), targets, scores.shape[1])

    def add(self, classes: Tensor, targets: Tensor, count: int) -> None:
        """Add predicted classes and labels of one shape, for a number of classes."""
        valid = targets != IGNORED
        pairs = torch.bincount(targets[valid] * count + classes[valid], minlength=count * count)
        matrix = pairs.view(count, count).double()
        self.totals = self.totals + matrix if len(self.totals) else matrix

    def compute(self) -> dict[str, float]:
        """Return pixel accuracy and the mean IoU, both 0..1.

        A class that occurs neither in the labels nor in the predictions is left out of the mean; the common
        intersection / (union + eps) would count it as 0.
        """
        if not self.totals.any():
            raise MicronetError(f"the masks have no labeled pixels (all are {IGNORED}); check them")
        iou = self.class_iou()
        present = iou[~iou.isnan()]
        accuracy = self.totals.diagonal().sum() / self.totals.sum()
        return {"mean_iou": float(present.mean()), "pixel_accuracy": float(accuracy)}

    def class_iou(self) -> Tensor:
        """Return intersection over union per class, (K,); NaN for a class that does not occur."""
        correct = self.totals.diagonal()
        return correct / (self.totals.sum(0) + self.totals.sum(1) - correct)


@dataclass(frozen=True)
class Segmentation(Task):
    """Semantic segmentation."""

    label_smoothing: float | None = 0.0
    least_classes: int | None = None

    name = "segmentation"
    main = "mean_iou"
    has_classes = True

    def open(self, place: str, image_size: ImageSize | None) -> DataSource:
        """Open folders of images and masks."""
        return open_masks(Path(place), image_size)

    def check(self, outputs: Outputs, spec: DataSpec, name: str) -> None:
        """Raise MicronetError unless the first output has a score for each class at each pixel."""
        scores = outputs if isinstance(outputs, Tensor) else next(iter(outputs), None)
        if scores is None or scores.dim() != 4:
            raise MicronetError(
                f"--task segmentation needs class scores for every pixel, of shape (N, classes, height, width), but "
                f"{name} returned {describe(outputs)}; {OTHER_TASKS}"
            )
        classes = len(spec.classes or []) if self.least_classes is None else self.least_classes
        if scores.shape[1] < classes:
            known = self.find_class(spec.name or "", scores.shape[1])
            if self.least_classes is not None:
                known = f"a mask has class {classes - 1}"
            raise MicronetError(
                f"{name} outputs scores for {scores.shape[1]} classes, 0 to {scores.shape[1] - 1}, but "
                f"{known or f'classes.txt lists {classes} classes'}; fix the mask if that is a mistake, or "
                f"rebuild the network with {classes} classes"
            )

    def given(self, labels: list[Any]) -> tuple[Task, list[Any]]:
        """Return the task with the number of classes, and class numbers (N, H, W)."""
        found = [class_numbers(each, 3, IGNORED) for each in labels]
        return replace(self, least_classes=count_classes(found, IGNORED)), found

    def find_class(self, place: str, least: int) -> str | None:
        """Name a mask that has a class of at least ``least``."""
        return find_class(Path(place), least) if Path(place).is_dir() else None

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Return the mean cross-entropy of scores (N, K, h, w), resampled to the labels' size, and labels (N, H, W)."""
        scores = resampled(first_output(outputs), targets)
        smoothing = self.label_smoothing or 0.0
        total = F.cross_entropy(scores, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
        loss: Tensor = total / (targets != IGNORED).sum().clamp(min=1)
        return loss

    def meter(self) -> Overlap:
        """Return an empty meter of pixel accuracy and mean IoU."""
        return Overlap()


def resampled(scores: Tensor, targets: Tensor) -> Tensor:
    """Return scores (N, K, h, w), resampled bilinearly to the size of labels (N, H, W)."""
    highest = int(torch.where(targets == IGNORED, 0, targets).max())
    if highest >= scores.shape[1]:
        raise MicronetError(
            f"a mask has class {highest}, but the network scores classes 0 to {scores.shape[1] - 1}; fix the masks"
        )
    if scores.shape[2:] == targets.shape[1:]:
        return scores
    full: Tensor = F.interpolate(scores, tuple(targets.shape[1:]), mode="bilinear", align_corners=False)
    return full
