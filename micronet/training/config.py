"""The settings of a training, what surrounds it, and the learning rate. No torch here, so ``--help`` stays fast."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micronet.core.config import Settings, setting
from micronet.core.progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from torch import nn

ONE_CYCLE_RISE = 0.25  # share of the steps in which the learning rate rises
DEFAULT_LR = 0.01
DISTILLATION = ("distill", "distill_weight", "temperature")
UNUSED = {"accumulate": 1, "amp": "off", "patience": None}  # recorded only if changed
STEP_DECAYS = (0.5, 0.75, 0.9)  # shares of the steps after which the learning rate is divided by ten


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Training."""

    epochs: int = setting(8, "Passes over the training images; 0 trains nothing.", low=0, basic=True)
    lr: float | None = setting(
        None, "Peak learning rate. Default: 0.01; finetune and quantize have their own.", low=0, basic=True
    )
    batch_size: int = setting(64, "Images per batch, summed over all processes.", low=1, basic=True)
    accumulate: int = setting(1, "Batches per optimizer step; their gradients add up.", low=1)
    amp: Literal["off", "bf16", "fp16"] = setting(
        "off", "Mixed precision: run forward and backward in 16 bits. fp16 needs a GPU and is untested."
    )
    patience: int | None = setting(
        None, "Stop after N epochs without improvement in validation accuracy (ties: loss).", low=1, metavar="N"
    )
    weight_decay: float = setting(0.0, "L2 penalty on the weights.", low=0)
    optimizer: Literal["adam", "sgd"] = setting("adam", "Adam, or SGD with Nesterov momentum 0.9.")
    schedule: Literal["one-cycle", "step"] = setting(
        "one-cycle", "Learning rate: up and then down to zero, or divided by ten after 50, 75 and 90 % of the steps."
    )
    label_smoothing: float = setting(
        0.0, "Probability that the training target spreads evenly over all classes.", low=0, high=0.99
    )
    distill: Path | None = setting(
        None, "An artifact to learn from: its scores serve as soft labels.", metavar="ARTIFACT"
    )
    distill_weight: float = setting(0.5, "Weight of the soft labels in the loss.", low=0, high=1)
    temperature: float = setting(4.0, "Softmax temperature of both networks' scores in distillation.", low=0.01)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return DEFAULT_LR if self.lr is None else self.lr

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, without those that took no part."""
        fields = {**super().to_json(), "lr": self.peak_lr}
        if self.distill is not None:
            fields["distill"] = str(self.distill)
        unused = UNUSED if self.distill is not None else UNUSED | {name: fields[name] for name in DISTILLATION}
        return {name: value for name, value in fields.items() if name not in unused or value != unused[name]}


@dataclass(frozen=True)
class TrainHooks:
    """What a stage adds to plain training."""

    observe: Callable[["nn.Module"], AbstractContextManager[Any]] = nullcontext  # around the steps of each epoch
    penalty: Callable[[], None] | None = None  # adds to the gradients between backward and the optimizer's step
    keep: Literal["best", "last"] = "best"  # the result: the best epoch's weights on validation images, or the last's
    config: dict[str, Any] = field(default_factory=dict)  # the stage's settings; to resume, they must be the same


NO_HOOKS = TrainHooks()


@dataclass(frozen=True)
class RunContext:
    """Where and how a training runs; nothing here changes its result except the seed."""

    output: Path  # the artifact's; the checkpoint and the log are written beside it
    device: "torch.device"
    seed: int = 1
    resume: bool = False
    force: bool = False
    progress: Progress = Silent()  # noqa: RUF009  # it has no state
    deadline: float = math.inf  # when to stop, in seconds of time.monotonic
    checkpoint_minutes: float = 10.0  # between checkpoints within an epoch; 0: after every step
    compiled: bool = False  # run the network through torch.compile


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, 0 <= step < steps."""
    return config.peak_lr * SCHEDULES[config.schedule]((step + 0.5) / steps)


def _one_cycle(share: float) -> float:
    """Half a cosine up, then half a cosine down (Smith and Topin 2017, arXiv:1708.07120)."""
    if share < ONE_CYCLE_RISE:
        return (1 - math.cos(math.pi * share / ONE_CYCLE_RISE)) / 2
    return (1 + math.cos(math.pi * (share - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))) / 2


# A schedule: the share of the steps that is over, 0..1 -> the learning rate divided by its peak.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "one-cycle": _one_cycle,
    "step": lambda share: 0.1 ** sum(share > decay for decay in STEP_DECAYS),
}
