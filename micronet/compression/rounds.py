"""Training candidates within a budget: all of them a little, then the better half longer (successive halving).

As in Jamieson and Talwalkar (2016, arXiv:1502.07943), but a round trains on from the round before: a further finetune
stage of the same recipe. Better are those whose drop is closest to the one that is allowed: smaller networks cannot
reach it, larger ones have no need to.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from micronet.compression.plan import Plan, with_epochs
from micronet.compression.point import Point
from micronet.compression.workshop import Workshop
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.errors import count
from micronet.models.device import memory_format, place_inputs
from micronet.models.modes import copy_model
from micronet.tasks.task import outputs_of

MOST_EPOCHS = (2, 4, 8)  # of each round
QAT_EPOCHS = 3  # epochs of finetuning that take as long as one of QAT, with its calibration
BATCH, STEPS = 32, 3
OVERHEAD = 1.6  # of an epoch: the teacher, decoding, the optimizer and validation, over forward and backward


@dataclass
class Rounds:
    """Trains candidates in rounds.

    Attributes:
        workshop: Where they are made.
        budget: Seconds for the whole search.
        epoch: Seconds of an epoch of the original.
        max_drop: The drop that is allowed, 0..1.
        left_out: What did not fit, in words.
    """

    workshop: Workshop
    budget: float
    epoch: float
    max_drop: float
    left_out: list[str] = field(default_factory=list)

    def run(self, plans: Sequence[tuple[str, Plan]]) -> None:
        """Train candidates, those to keep if not all fit first, until the budget is spent."""
        survivors = list(plans)
        for number, most in enumerate(MOST_EPOCHS, 1):
            if not survivors:
                return
            names = [name for name, _ in survivors]
            chosen = self.workshop.notes.once(f"round {number}", lambda: self._schedule(names, most))  # noqa: B023
            fitting = [(name, plan) for name, plan in survivors if name in chosen["names"]]
            self._say_left_out(number, [name for name in names if name not in chosen["names"]])
            points = [self._train(name, plan, chosen["epochs"]) for name, plan in fitting]
            ranked = sorted((each for each in points if not each.failed and each.plan.epochs), key=self._distance)
            kept = ranked[: (len(ranked) + 1) // 2]
            survivors = [(name, point.plan) for point in kept for name, _ in fitting if point.name.startswith(name)]

    def _train(self, name: str, plan: Plan, epochs: int) -> Point:
        longer = with_epochs(plan, epochs) if plan.widths else plan
        trained = "+".join(map(str, longer.epochs))
        label = f"{name}, {trained} epochs" if trained not in ("", "1") else f"{name}, 1 epoch" if trained else name
        return self.workshop.confirm(label, longer)

    def _schedule(self, names: list[str], most: int) -> dict[str, Any]:
        """Return the candidates that fit, and how many epochs each trains for in this round."""
        remaining = self.budget - self.workshop.notes.spent
        fixed = self._fixed()
        for part in (0.5, 1.0):  # half of the time is for later rounds, unless that is too little for any
            for number in range(len(names), 0, -1):
                epochs = min(most, int((part * remaining / number - fixed) / max(self.epoch, 1e-3)))
                if epochs >= 1:
                    return {"names": names[:number], "epochs": epochs}
        return {"names": [], "epochs": 0}

    def _fixed(self) -> float:
        """Return the seconds that a candidate takes besides its training."""
        made = [
            60 * point.minutes for point in self.workshop.points if not point.plan.trains and not point.plan.is_float
        ]
        return max(made, default=60 * self.workshop.points[0].minutes)

    def _distance(self, point: Point) -> float:
        return abs(point.drop - self.max_drop)

    def _say_left_out(self, number: int, names: list[str]) -> None:
        if names:
            said = f"no time to train {', '.join(names)}" + ("" if number == 1 else " for longer")
            self.left_out.append(f"{said}; a larger --budget would")
            self.workshop.progress.line(self.left_out[-1])


def epoch_seconds(model: torch.nn.Module, data: Dataset, device: torch.device) -> float:
    """Return about how many seconds an epoch of finetuning takes: a step of a copy of the network is timed."""
    trial = copy_model(model).to(device).to(memory_format=memory_format(model)).train()
    batch = next(iter(data.referenced(eval_batches(data.validation, data.spec, BATCH))))
    given, targets = tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
    samples, least = min(BATCH, len(data.validation)), float("inf")
    with torch.random.fork_rng():
        for _ in range(1 + STEPS):
            start = time.perf_counter()
            outputs = outputs_of(trial(*place_inputs(given, device, memory_format(trial))))
            loss = data.task.loss(outputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())
            least = min(least, time.perf_counter() - start)
    return OVERHEAD * least * len(data.train) / samples


def describe_budget(epoch: float, number: int) -> str:
    """Say how long candidates train for, at least."""
    return f"{count(number, 'candidate')} for 1 epoch each would train for {number * epoch / 60:.1f} minutes"
