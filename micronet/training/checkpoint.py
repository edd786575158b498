"""Checkpoints: everything that a killed training needs to continue.

One safetensors file beside the artifact holds the weights, the best weights so far, the optimizer's state and the
progress. It is written after each epoch and at intervals within one, and removed when the artifact is saved.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micronet.artifact.artifact import load_state, read_tensors, write_tensors
from micronet.core.config import accepts
from micronet.core.files import remove_leftovers
from micronet.core.parse import make_record
from micronet.core.tensor_file import Table, read_table
from micronet.errors import FailedError, MicronetError, first_line
from micronet.models.finite import check_no_nan

if TYPE_CHECKING:
    from micronet.training.step import TrainStep

_KEY = "micronet-checkpoint"
# What optimizers keep of a parameter: Muon of a matrix and of others, torch's SGD with and without momentum, and Adam.
SLOTS: tuple[set[str], ...] = (
    {"momentum", "norm"}, {"step", "mean", "square"}, {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, set(),
)  # fmt: skip
SINGLE = ("norm", "step")  # of these, one number
_PARTS = {
    "identity": dict[str, Any], "reached": dict[str, Any], "groups": list[dict[str, Any]],
    "numbers": dict[str, dict[str, float | None]],
}  # fmt: skip


@dataclass
class TrainState:
    """The progress of a training."""

    rows: list[dict[str, float]] = field(default_factory=list)  # the metrics of each finished epoch
    step: int = 0  # steps taken in the current epoch
    loss: float = 0.0  # summed over the images of the current epoch so far
    images: int = 0  # of the current epoch so far
    scaler: dict[str, Any] = field(default_factory=dict)  # the state of fp16's gradient scaler
    before: dict[str, float] = field(default_factory=dict)  # the metrics before the first step, if they were measured

    @property
    def epoch(self) -> int:
        """The current epoch, from 1."""
        return len(self.rows) + 1

    def add_step(self, loss: float, images: int) -> None:
        """Add a step with its mean loss and its number of images."""
        self.step += 1
        self.loss += loss * images
        self.images += images

    def end_epoch(self, row: dict[str, float]) -> None:
        """Finish the current epoch with its metrics."""
        self.rows.append(row)
        self.step, self.loss, self.images = 0, 0.0, 0


@dataclass
class Checkpoint:
    """A checkpoint file."""

    path: Path
    identity: dict[str, Any]  # settings, data and history, which must be the same to resume
    best: dict[str, Tensor] = field(default_factory=dict)  # the best weights so far
    saved_s: float = field(default_factory=time.monotonic)  # when it was last saved, or this object created

    @classmethod
    def beside(cls, output: Path, identity: dict[str, Any]) -> "Checkpoint":
        """Return the checkpoint that belongs to an artifact's path."""
        return cls(output.with_suffix(".checkpoint.safetensors"), identity)

    def begin(self, step: "TrainStep", *, resume: bool, force: bool) -> TrainState:
        """Load a checkpoint into a step's model and optimizer if ``resume``; return the state to train from.

        Raises MicronetError if there is a checkpoint and neither ``resume`` nor ``force``, or if it cannot be resumed.
        """
        remove_leftovers(self.path)
        found = self.path.exists()
        if found and resume:
            return self._load(step)
        if found and not force:
            raise MicronetError(
                f"{self.path} was left by an interrupted run; add --resume to continue it, or --force to start over"
            )
        self.remove()
        return TrainState()

    def save(self, step: "TrainStep", state: TrainState, *, best: bool = False) -> None:
        """Write the checkpoint; ``best`` marks these weights as the best so far.

        Raises FailedError if it could not be written; an earlier checkpoint is still complete.
        """
        state.scaler = step.scaler.state_dict()
        weights, optimizer_state = step.model.state_dict(), step.optimizer.state_dict()
        if best:
            self.best = {name: tensor.detach().clone() for name, tensor in step.result.state_dict().items()}
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        if step.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in step.average.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, slots in optimizer_state["state"].items():
            for name, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        groups = optimizer_state["param_groups"]
        header = {"identity": self.identity, "reached": asdict(state), "groups": groups, "numbers": numbers}
        self.saved_s = time.monotonic()
        distinct = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        try:
            write_tensors(self.path, distinct, _KEY, header)
        except FailedError as error:
            advice = "free some disk space, then start again"
            if self.path.exists():
                advice = "the previous checkpoint is intact; free some disk space, then run again with --resume"
            raise FailedError(f"{error}; {advice}") from error

    def recorded(self) -> dict[str, Any]:
        """Return the settings that the file was written with; none if there is no such file, or it is damaged."""
        try:
            identity: dict[str, Any] = _read(read_table(self.path))["identity"]
            return identity
        except (OSError, KeyError, ValueError):
            return {}

    def remove(self) -> None:
        """Delete the file if it exists."""
        self.path.unlink(missing_ok=True)

    def _load(self, step: "TrainStep") -> TrainState:
        try:
            table = read_table(self.path)
            header = _read(table)
            state = make_record(TrainState, header["reached"])
            tensors = read_tensors(self.path, table)
        except (OSError, KeyError, ValueError, MicronetError) as error:
            raise MicronetError(f"{self.path} is corrupted ({error}); add --force to start over") from error
        initial = self.identity.get("initial_weights")
        before = {"initial_weights": initial, **header["identity"]}  # which files of earlier versions do not have
        if "distill" in before:
            before["distill"] = Path(before["distill"]).name  # the whole path in files of earlier versions
        if before["initial_weights"] != initial:
            raise MicronetError(
                f"{self.path} belongs to a training run that started from different weights; resume with the same "
                "input file, or add --force to start over"
            )
        keys = sorted({*before, *self.identity})
        if changed := [key for key in keys if before.get(key) != self.identity.get(key)]:
            raise MicronetError(
                f"{self.path} was written with different settings ({', '.join(changed)}); resume with the same "
                "settings, or add --force to start over"
            )
        load_state(step.model, _without_prefix("model.", tensors), str(self.path))
        if step.average is not None:
            load_state(step.average, _without_prefix("average.", tensors), str(self.path))
        self.best = _without_prefix("best.", tensors)
        check_no_nan(tensors, str(self.path))
        try:
            if state.rows and self.best.keys() != step.result.state_dict().keys():
                raise ValueError("its best weights are incomplete")
            _load_optimizer(step.optimizer, header, _without_prefix("optimizer.", tensors))
        except (ValueError, KeyError) as error:
            raise MicronetError(
                f"{self.path} is corrupted or was written by another version of micronet ({first_line(error)}); add "
                "--force to start over"
            ) from error
        return state


def _read(table: Table) -> dict[str, Any]:
    """Return a checkpoint's header; raise KeyError or ValueError if it is damaged."""
    header = table.header(_KEY)
    for name, kind in _PARTS.items():
        if not accepts(kind, header[name]):
            raise ValueError(f"its {name} have the wrong type")
    return header


def _load_optimizer(optimizer: torch.optim.Optimizer, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Load the state of an optimizer; raise ValueError if it does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in header["numbers"].items()}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"the network has no parameter {index!r}")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # in the same memory format, so that sums are bit-identical
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        elif tensor.numel() != 1 or slot not in SINGLE:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        state.setdefault(int(index), {})[slot] = tensor
    if any(slots.keys() not in SLOTS or not all(map(_is_valid, slots, slots.values())) for slots in state.values()):
        raise ValueError("its optimizer's state is incomplete")
    groups = optimizer.state_dict()["param_groups"]
    for own, stored in zip(groups, header["groups"], strict=True):
        settings = {**json.loads(json.dumps(own)), "lr": stored.get("lr")}  # the schedule sets the rate at every step
        if any(name not in settings or settings[name] != value for name, value in stored.items()):
            raise ValueError("its optimizer has other settings")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_valid(slot: str, value: Any) -> bool:
    """Return True for a tensor, a number of steps, or the momentum that SGD does not have."""
    if slot == "step" and type(value) is int:
        return 0 < value < 2**53
    return isinstance(value, Tensor) or (slot == "momentum_buffer" and value is None)


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
