"""A user's own task: a class with four methods, ``data``, ``loss``, ``update`` and ``compute`` (docs/tasks.md)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from micronet.core.image_size import ImageSize
from micronet.data.dataset import DataSource, DataSpec
from micronet.data.samples import SampleSplit
from micronet.errors import MicronetError, explain_code_error, first_line
from micronet.models.build import user_object
from micronet.tasks.task import Outputs, Task, describe

METHODS = {
    "data": "data(place, part)", "loss": "loss(outputs, targets)", "update": "update(outputs, targets)",
    "compute": "compute()",
}  # fmt: skip


class Custom(Task):
    """A task of the user's class; each meter is a new instance of it."""

    def __init__(self, name: str) -> None:
        self._make: Callable[[], Any] = user_object(name, "--task")
        self.name = name
        self._own = self._new()
        missing = [text for method, text in METHODS.items() if not callable(getattr(self._own, method, None))]
        if missing:
            raise MicronetError(f"--task {name} has no method {' or '.join(missing)}; see docs/tasks.md")
        self.main = getattr(self._own, "main", "")
        if not self.main:
            raise MicronetError(f'--task {name} does not name its main metric; add, for example, main = "map50"')
        self.higher_is_better = bool(getattr(self._own, "higher_is_better", True))
        listed = getattr(self._own, "lower_is_better", ())
        self._lower_is_better = (listed,) if isinstance(listed, str) else tuple(listed)
        if self.main in self._lower_is_better:
            self.higher_is_better = False

    def open(self, place: str, image_size: ImageSize | None) -> DataSource:
        """Read the parts that the user's ``data`` returns; without a validation part, train is split."""
        validation = self._call("data", place, "validation")
        return DataSource(
            train=partial(self._part, place, "train"),
            test=partial(self._part, place, "test"),
            is_images=False,
            validation=None if validation is None else partial(self._split, validation, "validation"),
        )

    def check(self, outputs: Outputs, spec: DataSpec, name: str) -> None:
        """Do nothing: only the user's loss knows what it expects."""

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Return the user's loss."""
        loss = self._call("loss", outputs, targets)
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise MicronetError(f"--task {self.name}: loss returned {got}; it must return a tensor with one number")
        return loss

    def prefers_more(self, metric: str) -> bool:
        """Return whether larger values of a metric are better, by the user's list or by its name."""
        return metric not in self._lower_is_better and super().prefers_more(metric)

    def meter(self) -> "CustomMeter":
        """Return a meter that is a new instance of the user's class."""
        return CustomMeter(self, self._new())

    def _new(self) -> Any:
        try:
            return self._make()
        except Exception as error:  # the user's code may raise anything
            raise MicronetError(f"--task {self.name} failed {explain_code_error(error)}") from error

    def _part(self, place: str, part: str) -> SampleSplit:
        return self._split(self._call("data", place, part), part)

    def _split(self, samples: Any, part: str) -> SampleSplit:
        if not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__"):
            raise MicronetError(
                f"--task {self.name}: data returned {type(samples).__name__} for the part {part!r}; it must return a "
                "list or a torch Dataset of (input, target)"
            )
        if not len(samples):
            raise MicronetError(f"--task {self.name}: data returned no samples for the part {part!r}")
        return SampleSplit(samples, f"--task {self.name}")

    def _call(self, method: str, *values: Any) -> Any:
        return self.guarded(self._own, method, *values)

    def guarded(self, own: Any, method: str, *values: Any) -> Any:
        """Call a method of the user's; raise MicronetError that says what it was given if it fails."""
        try:
            return getattr(own, method)(*values)
        except MicronetError:
            raise
        except Exception as error:  # the user's code may raise anything
            tensors = values and (isinstance(values[0], (Tensor, list)))
            given = f"; the network returned {describe(values[0])}" if tensors else ""
            raise MicronetError(
                f"--task {self.name}: {method} failed ({type(error).__name__}: {first_line(error)}){given}; "
                "fix the code"
            ) from error


class CustomMeter:
    """The metrics of one evaluation by a user's task."""

    def __init__(self, task: Custom, own: Any) -> None:
        self._task, self._own = task, own

    def update(self, outputs: Outputs, targets: Any) -> None:
        """Add a batch."""
        with torch.no_grad():
            self._task.guarded(self._own, "update", outputs, targets)

    def compute(self) -> dict[str, float]:
        """Return the user's metrics as plain numbers."""
        found = self._task.guarded(self._own, "compute")
        name = self._task.name
        if not isinstance(found, dict) or self._task.main not in found:
            raise MicronetError(
                f"--task {name}: compute returned {found!r}; it must return a dict that contains {self._task.main}"
            )
        try:
            metrics = {str(key): float(value) for key, value in found.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise MicronetError(f"--task {name}: compute returned a metric that is not a number ({error})") from error
        if not math.isfinite(metrics[self._task.main]):
            raise MicronetError(f"--task {name}: {self._task.main} is {metrics[self._task.main]}; it must be finite")
        return metrics
