"""Image classification: one row of class scores per image, cross-entropy, accuracy."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from micronet.core.image_size import ImageSize
from micronet.data.dataset import DataSource, DataSpec
from micronet.data.load import open_images
from micronet.errors import MicronetError
from micronet.tasks.task import OTHER_TASKS, Outputs, Task, class_numbers, count_classes, first_output

NO_SCORES = "the network must return class scores of shape (N, classes), one row per image"


class Accuracy:
    """The class predicted for each image, and the number of correct ones."""

    def __init__(self) -> None:
        self._classes: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.totals = torch.zeros(2, dtype=torch.float64)  # correct and all images; ranks add theirs up

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class predicted for each image, (N,)."""
        return np.concatenate(self._classes)

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Add scores (N, K) and labels (N,)."""
        best = first_output(outputs).argmax(1)
        self._classes.append(best.numpy())
        self.totals += torch.tensor([int((best == targets).sum()), len(targets)])

    def compute(self) -> dict[str, float]:
        """Return the accuracy, 0..1."""
        correct, images = self.totals.tolist()
        return {"accuracy": correct / images}


@dataclass(frozen=True)
class Classification(Task):
    """Image classification."""

    label_smoothing: float | None = 0.0
    least_classes: int | None = None

    name = "classification"
    main = "accuracy"
    has_classes = True

    def open(self, place: str, image_size: ImageSize | None) -> DataSource:
        """Open a built-in data set, class folders, an .npz file, or the user's arrays."""
        return open_images(place, image_size)

    def check(self, outputs: Outputs, spec: DataSpec, name: str) -> None:
        """Raise MicronetError unless there is a row of scores per image, with the data set's number of classes."""
        classes = len(spec.classes or [])
        scores = outputs if isinstance(outputs, Tensor) else next(iter(outputs), None)
        if scores is None or (isinstance(outputs, list) and scores.dim() != 2):
            shapes = ", ".join(str(tuple(each.shape)) for each in outputs) or "no tensor"
            raise MicronetError(f"{NO_SCORES}; got {len(outputs)} outputs ({shapes}); {OTHER_TASKS}")
        if scores.dim() != 2:
            raise MicronetError(f"{NO_SCORES}; got shape {tuple(scores.shape)}; {OTHER_TASKS}")
        if self.least_classes is not None:
            if scores.shape[1] < self.least_classes:
                raise MicronetError(
                    f"a label is class {self.least_classes - 1}, but {name} scores classes 0 to {scores.shape[1] - 1}; "
                    "fix the labels, or use a network with more classes"
                )
            return
        if scores.shape[1] != classes:
            raise MicronetError(
                f"{name} outputs scores for {scores.shape[1]} classes, but the data set has {classes}; build a network "
                f"with {classes} classes: pass the argument that sets them with --model-args to the command that "
                "creates it, or use a data set with the network's classes"
            )

    def given(self, labels: list[Any]) -> tuple[Task, list[Any]]:
        """Return the task with the number of classes, and class numbers (N,)."""
        found = [class_numbers(each, 1) for each in labels]
        return replace(self, least_classes=count_classes(found)), found

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Return the mean cross-entropy of scores (N, K) and labels (N,)."""
        return F.cross_entropy(first_output(outputs), targets, label_smoothing=self.label_smoothing or 0.0)

    def meter(self) -> Accuracy:
        """Return an empty meter of accuracy."""
        return Accuracy()


DEFAULT_TASK = Classification()
