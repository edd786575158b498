"""What a user chooses about training, and the learning rate that follows; no torch here, so ``--help`` stays fast."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from micronet.core.config import Settings, check_range, check_values, setting

ONE_CYCLE_RISE = 0.25  # share of the steps in which the learning rate rises
DEFAULT_LR = 0.01
TEACHING = ("distill", "distill_weight", "temperature")
UNUSED = {"accumulate": 1, "amp": "off", "patience": None}  # recorded only where something else was asked
STEP_DECAYS = (0.5, 0.75, 0.9)  # shares of the steps after which it falls to a tenth


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train."""

    epochs: int = setting(8, "Passes over the training images; 0 trains nothing.")
    lr: float | None = setting(None, "Highest learning rate; default: 0.01, or what suits the command.")
    batch_size: int = setting(64, "Images a batch, over all processes.")
    accumulate: int = setting(1, "Batches a step: their gradients add up as one larger batch's.")
    amp: Literal["off", "bf16", "fp16"] = setting(
        "off", "Compute forward and backward in 16 bits; fp16 needs a GPU (untried there)."
    )
    patience: int | None = setting(
        None, "Stop after so many epochs without a better validation: more right, or as many at a lower loss."
    )
    weight_decay: float = setting(0.0, "L2 penalty on all weights.")
    optimizer: Literal["adam", "sgd"] = setting("adam", "Adam, or SGD with Nesterov momentum 0.9.")
    schedule: Literal["one-cycle", "step"] = setting(
        "one-cycle", "Learning rate: up, then down to zero; or divided by ten at 50, 75 and 90 % of the steps."
    )
    label_smoothing: float = setting(0.0, "Share of the target given to all classes alike.")
    distill: Path | None = setting(None, "An artifact to learn from as well; its scores are soft labels.")  # noqa: RUF009
    distill_weight: float = setting(0.5, "Share of the loss that the teacher's soft labels have.")
    temperature: float = setting(4.0, "Divides both networks' scores before they are compared with the teacher's.")

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "epochs", 0)
        if self.lr is not None:
            check_range(self, "lr", 0)
        check_range(self, "batch_size", 1)
        check_range(self, "accumulate", 1)
        if self.patience is not None:
            check_range(self, "patience", 1)
        check_range(self, "weight_decay", 0)
        check_range(self, "label_smoothing", 0, 0.99)
        check_range(self, "distill_weight", 0, 1)
        check_range(self, "temperature", 0.01)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return DEFAULT_LR if self.lr is None else self.lr

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, those of a teacher and the like only where they take part."""
        fields = {**super().to_json(), "lr": self.peak_lr}
        fields = {name: value for name, value in fields.items() if name not in UNUSED or value != UNUSED[name]}
        if self.distill is None:
            return {name: value for name, value in fields.items() if name not in TEACHING}
        return {**fields, "distill": str(self.distill)}


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, 0 <= step < steps.

    One-cycle (Smith and Topin 2017, arXiv:1708.07120): half a cosine up over the first quarter, half a cosine down.
    """
    share = (step + 0.5) / steps
    if config.schedule == "step":
        return config.peak_lr * 0.1 ** sum(share > decay for decay in STEP_DECAYS)
    if share < ONE_CYCLE_RISE:
        return config.peak_lr * (1 - math.cos(math.pi * share / ONE_CYCLE_RISE)) / 2
    return config.peak_lr * (1 + math.cos(math.pi * (share - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))) / 2
