"""What a training needs to go on after it was killed: weights, best weights, optimizer state and how far it was.

One safetensors file beside the artifact, written after each epoch and now and then within one, gone when the training
is done.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from micronet.artifact.artifact import load_state, write_tensors
from micronet.core.files import remove_leftovers
from micronet.errors import FailedError, MicronetError

_KEY = "micronet-checkpoint"
_SHAPE = {"identity": dict, "reached": dict, "groups": list, "numbers": dict}


@dataclass
class TrainState:
    """How far a training is.

    ``rows``: the numbers of the epochs that are whole. Of the next one: ``step``, the steps taken; ``loss``, the sum
    over their ``images``. ``scaler``: of fp16's gradients.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    loss: float = 0.0
    images: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The epoch that runs, from 1."""
        return len(self.rows) + 1

    def add_step(self, loss: float, images: int) -> None:
        """Add one step's mean loss over its images."""
        self.step += 1
        self.loss += loss * images
        self.images += images

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Add a whole epoch's numbers."""
        self.rows.append(row)
        self.step, self.loss, self.images = 0, 0.0, 0


@dataclass
class Checkpoint:
    """The file, what must be equal for a resume (``identity``), and the best weights so far."""

    path: Path
    identity: dict[str, Any]
    _best: dict[str, Tensor] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def beside(cls, output: Path, identity: dict[str, Any]) -> "Checkpoint":
        """Return the checkpoint that belongs to an artifact's path."""
        return cls(output.with_name(f"{output.stem}.checkpoint.safetensors"), identity)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, resume: bool, force: bool) -> TrainState:
        """Return how far the training was, its state loaded into model and optimizer; nowhere without ``resume``.

        Raises MicronetError where a checkpoint is there and neither resume nor force was asked for.
        """
        remove_leftovers(self.path)
        if not self.path.exists():
            return TrainState()
        if resume:
            return self._load(model, optimizer)
        if not force:
            raise MicronetError(
                f"an interrupted training left {self.path}; add --resume to go on with it, --force to start again"
            )
        self.remove()
        return TrainState()

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, reached: TrainState, *, best: bool = False
    ) -> None:
        """Write the state; ``best`` says that these are the best weights so far.

        Raises FailedError where the disk refuses; the checkpoint before stays whole.
        """
        if best:
            self._best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        numbers: dict[str, dict[str, Any]] = {}
        state = optimizer.state_dict()
        for index, slots in state["state"].items():
            for name, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        header = {
            "identity": self.identity,
            "reached": asdict(reached),
            "groups": state["param_groups"],
            "numbers": numbers,
        }
        self._saved = time.monotonic()
        distinct = {name: tensor.clone() for name, tensor in tensors.items()}  # tied weights are written twice here
        try:
            write_tensors(self.path, distinct, _KEY, header)
        except FailedError as error:
            kept = "the checkpoint before is whole: make room, then add --resume"
            raise FailedError(f"{error}; {kept if self.path.exists() else 'make room, then start again'}") from error

    @property
    def age_s(self) -> float:
        """Seconds since the state was last written, or since this object was made."""
        return time.monotonic() - self._saved

    def load_best(self, model: nn.Module) -> None:
        """Put the best epoch's weights into the model."""
        model.load_state_dict(self._best)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                if not all(isinstance(header[key], kind) for key, kind in _SHAPE.items()):
                    raise ValueError("its header")
                reached = TrainState(**header["reached"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise MicronetError(f"{self.path} is no whole checkpoint ({error}); add --force to start again") from error
        changed = [key for key, value in self.identity.items() if header["identity"].get(key) != value]
        if changed:
            raise MicronetError(
                f"{self.path} was made with other settings ({', '.join(changed)}); give the same, or --force"
            )
        load_state(model, _under("model.", tensors), str(self.path))
        self._best = _under("best.", tensors)
        self._load_optimizer(optimizer, header, _under("optimizer.", tensors))
        return reached

    @staticmethod
    def _load_optimizer(optimizer: torch.optim.Optimizer, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Any]] = {int(index): dict(held) for index, held in header["numbers"].items()}
        for name, tensor in tensors.items():
            index, _, slot = name.partition(".")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:  # the same memory layout too: sums must come out bit-identical
                tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            state.setdefault(int(index), {})[slot] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
