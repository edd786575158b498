"""The contract of a task: how data are read, what a network must return, the loss, and the metrics.

Outputs are one tensor or, if a network returns several, a list of them in its order (see ``outputs_of``). Nothing
outside a task assumes what they mean.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from micronet import registry
from micronet.core.image_size import ImageSize
from micronet.errors import MicronetError, unknown
from micronet.models.outputs import tensors_in

if TYPE_CHECKING:
    from micronet.data.dataset import DataSource, DataSpec

CLASSIFICATION = "classification"
OTHER_TASKS = "for other networks, use --task segmentation, --task agreement or --task FILE.py:TASK"
OWN_TASK = "for other labels, write a task of your own (docs/tasks.md)"
# The last words of the names of metrics of which less is better.
LESS_IS_BETTER = {"loss", "error", "mae", "mse", "rmse", "mape", "nll", "perplexity", "wer", "cer", "fid"}
Outputs = Tensor | list[Tensor]


class Meter(Protocol):
    """Metrics, accumulated over batches."""

    def update(self, outputs: Outputs, targets: Any) -> None:
        """Add a batch, on the CPU."""

    def compute(self) -> dict[str, float]:
        """Return the metrics of all batches: name -> value."""


class Task(ABC):
    """What a network is for.

    Attributes:
        name: What the user types after ``--task``.
        main: The metric that chooses the best epoch, and that drops are measured in.
        higher_is_better: Whether larger values of the main metric are better.
        has_classes: Whether the first output holds class scores on axis 1, which distillation softens.
        needs_reference: Whether targets are the outputs of a reference network instead of labels.
        label_smoothing: Share of the target probability that the loss spreads over all classes; None if it has none.
        least_classes: The number of classes that labels in memory need; None of other labels.
    """

    name: str
    main: str
    higher_is_better: bool = True
    has_classes: bool = False
    needs_reference: bool = False
    label_smoothing: float | None = None
    least_classes: int | None = None

    @abstractmethod
    def open(self, place: str, image_size: ImageSize | None) -> "DataSource":
        """Open the data set that the user named; raise MicronetError if it does not suit the task."""

    @abstractmethod
    def check(self, outputs: Outputs, spec: "DataSpec", name: str) -> None:
        """Raise MicronetError, which calls the network ``name``, if its outputs do not suit the task and the data."""

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    @abstractmethod
    def meter(self) -> Meter:
        """Return a new, empty meter."""

    def given(self, labels: list[Any]) -> tuple["Task", list[Any]]:
        """Return the task for labels in memory, those of one batch an item, and the labels as the loss takes them.

        Raises MicronetError if they do not suit the task.
        """
        return self, labels

    def smoothed(self, share: float) -> "Task":
        """Return the task with this label smoothing in its loss, or itself if its loss has none."""
        own: Any = self
        return self if self.label_smoothing is None else replace(own, label_smoothing=share)

    def find_class(self, place: str, least: int) -> str | None:
        """Name a file of a data set with a class of at least ``least``, if the task reads classes from files."""
        return None

    def quality(self, metrics: dict[str, float]) -> float:
        """Return the main metric, negated if smaller values are better."""
        return metrics[self.main] if self.higher_is_better else -metrics[self.main]

    def prefers_more(self, metric: str) -> bool:
        """Return whether larger values of a metric are better: of one that is not the main one, its name tells."""
        if metric == self.main:
            return self.higher_is_better
        return re.split(r"[^a-z0-9]+", metric.lower())[-1] not in LESS_IS_BETTER


def load_task(name: str | None, recorded: str = CLASSIFICATION) -> Task:
    """Return the task of a name or, without one, the recorded task.

    Raises:
        MicronetError: There is no such task, or the recorded one is the user's code, which only runs if typed.
    """
    place = name or recorded
    if place in registry.TASKS:
        task: Task = registry.load_object(registry.TASKS[place])()
        return task
    if ":" not in place:
        raise unknown("task", place, [*registry.TASKS, "path/to/file.py:Task"])
    if name is None:  # a file must not choose code to run
        raise MicronetError(
            f"the recorded task {place} is Python code, which is not run automatically; to run it, add --task {place}"
        )
    from micronet.tasks.custom import Custom

    return Custom(name)


def outputs_of(returned: Any) -> Outputs:
    """Return what a network returned as one tensor or, in their order, a list of those in any structure."""
    found = tensors_in(returned)
    return found[0] if len(found) == 1 else found


def first_output(outputs: Outputs) -> Tensor:
    """Return the first output: the scores of a network that also has auxiliary heads."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def class_numbers(labels: Any, rank: int, ignored: int | None = None) -> Tensor:
    """Return a batch's labels as int64: class numbers with an axis for the samples and ``rank - 1`` others.

    An axis of length 1 after the first is dropped. Raises MicronetError if they are not such numbers.
    """
    shape = "(N,)" if rank == 1 else "(N, height, width)"
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise MicronetError(
            f"the labels are a {type(labels).__name__}; expected class numbers, integers of shape {shape}; {OWN_TASK}"
        ) from None
    if found.dim() == rank + 1 and found.shape[1] == 1:
        found = found.squeeze(1)
    if found.dim() != rank or found.is_floating_point() or found.is_complex():
        raise MicronetError(
            f"the labels are {describe(found)}; expected class numbers, integers of shape {shape}; {OWN_TASK}"
        )
    found = found.long().cpu()
    if (lowest := int(found.min())) < 0:
        also = "" if ignored is None else f" ({ignored} is ignored)"
        raise MicronetError(f"a label is {lowest}; class numbers count from 0{also}")
    return found


def count_classes(labels: list[Tensor], ignored: int = -1) -> int:
    """Return the least number of classes that has all class numbers in the labels."""
    return max((int(torch.where(each == ignored, -1, each).max()) for each in labels), default=-1) + 1


def describe(outputs: Any) -> str:
    """Describe tensors or arrays: ``float32 (N, 10)``, with N for the batch; several are joined by ``and``."""
    each = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    texts = []
    for value in each:
        sizes = ", ".join(["N", *map(str, value.shape[1:])]) if len(value.shape) else ""
        texts.append(f"{str(value.dtype).removeprefix('torch.')} ({sizes})")
    return " and ".join(texts) or "no tensor"
