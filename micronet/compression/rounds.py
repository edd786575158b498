"""Training candidates within a budget: all of them a little, then the better half longer (successive halving).

As in Jamieson and Talwalkar (2016, arXiv:1502.07943), but a round trains on from the round before: a further finetune
stage of the same recipe. Better are those that do not keep the drop yet and are closest to it: smaller networks cannot
reach it, larger ones have no need to. With a target, only those that meet it can be chosen, whatever their drop is now.
One that its last training made worse, as small data do, trains no further.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_map_only

from micronet.compression.goal import Goal
from micronet.compression.plan import Plan, with_epochs
from micronet.compression.point import TOLERANCE, Point
from micronet.compression.workshop import Workshop
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.models.device import memory_format, place_inputs
from micronet.models.modes import copy_model
from micronet.tasks.task import outputs_of
from micronet.training.fits import prepare_training

MOST_EPOCHS = (2, 4, 8)  # of each round; on small data, as many as it takes to train on MOST_SAMPLES samples
MOST_SAMPLES = (3000, 6000, 12000)
BATCH, STEPS = 32, 3
OVERHEAD = 1.6  # of an epoch: the teacher, decoding, the optimizer and validation, over forward and backward


@dataclass
class Rounds:
    """Trains candidates in rounds.

    Attributes:
        workshop: Where they are made.
        epoch: Seconds of an epoch: first estimated, then those of the last training.
        goal: What is asked for.
        samples: The samples of an epoch.
    """

    workshop: Workshop
    epoch: float
    goal: Goal
    samples: int

    def run(self, plans: Sequence[tuple[str, Plan]]) -> None:
        """Train candidates, those to keep if not all fit first, until the budget is spent."""
        survivors, before = list(plans), dict[str, Point]()
        for number, most in enumerate(most_epochs(self.samples), 1):
            if not survivors:
                return
            notes, left = self.workshop.notes, len(survivors)
            fitting, epochs = notes.decide(f"round {number}", lambda: self._share(left, most))  # noqa: B023
            trained, waiting = [], [name for name, _ in survivors[fitting:]]
            for name, plan in survivors[:fitting]:
                if notes.decide(f"time for {name} in round {number}", lambda: self._fits(plan, epochs)):  # noqa: B023
                    trained.append((name, self._train(name, plan, epochs)))
                else:
                    waiting.append(name)
            self._say_left_out(waiting, again=number > 1)
            ranked = [(name, point) for name, point in trained if not point.failed and point.plan.epochs]
            ranked = [(name, point) for name, point in ranked if not self._is_worse(name, point, before.get(name))]
            ranked.sort(key=lambda each: self._rank(each[1]))
            ranked = [each for each in ranked if self._meets(each[1])] or ranked
            survivors, before = [(name, point.plan) for name, point in ranked[: (len(ranked) + 1) // 2]], dict(ranked)

    def refine(self, following: Callable[[], tuple[str, Plan] | None]) -> None:
        """Train further plans as the one that was trained longest, bits included, while there is time.

        ``following``: Returns the next one by what was measured so far, or None.
        """
        made = [point.plan for point in self.workshop.points if not point.failed]
        like = max(made, key=lambda plan: sum(plan.epochs), default=Plan())
        while like.epochs and (found := following()) is not None:
            label, plan = _label(found[0], like.epochs), found[1]
            trained = replace(plan, epochs=like.epochs, trained_bits=like.trained_bits)
            if not self.workshop.has_time(label, self._fixed() + sum(like.epochs) * self.epoch, trained):
                return
            self.workshop.confirm(label, trained)

    def _is_worse(self, name: str, point: Point, before: Point | None) -> bool:
        """Return True, and say so, if a candidate lost by training on, by more than the drop's standard error."""
        worse = before is not None and point.drop - (point.drop_error or 0.0) > before.drop + TOLERANCE
        if worse:
            self.workshop.progress.line(f"{name}: worse with more epochs, so it trains no further")
        return worse

    def _rank(self, point: Point) -> tuple[bool, float]:
        """Return the place of a candidate among those to train on, the least first."""
        if self.goal.target is None:
            return point.surely_keeps(self.goal.max_drop), abs(point.worst_drop - self.goal.max_drop)
        return not self._meets(point), point.worst_drop

    def _meets(self, point: Point) -> bool:
        """Whether a candidate is as small as the target, if there is one."""
        whole = self.goal.value(self.workshop.points[0])
        return self.goal.target is None or self.goal.is_met_by(self.goal.value(point) / whole)

    def _train(self, name: str, plan: Plan, epochs: int) -> Point:
        """Train a candidate for some more epochs, and learn how long an epoch takes."""
        longer = _longer(plan, epochs)
        point = self.workshop.confirm(_label(name, longer.epochs), longer)
        if plan.widths and not point.failed:
            self.epoch = max(0.0, 60 * point.minutes - self._fixed()) / epochs
        return point

    def _share(self, number: int, most: int) -> tuple[int, int]:
        """Return how many of some candidates train, and for how many epochs each, in half of the time that is left.

        Rather fewer candidates train than for less time than all else takes that is done to one: after a few short
        epochs, all look alike.
        """
        fixed, epoch, seconds = self._fixed(), max(self.epoch, 1e-3), 0.5 * self.workshop.remaining
        least = min(most, max(1, math.ceil(fixed / epoch)))
        fitting = max(1, min(number, int(seconds / (fixed + least * epoch))))
        return fitting, max(1, min(most, int((seconds / fitting - fixed) / epoch)))

    def _fits(self, plan: Plan, epochs: int) -> bool:
        made = self.workshop.is_made(_longer(plan, epochs))
        return made or self._fixed() + epochs * self.epoch <= self.workshop.remaining

    def _fixed(self) -> float:
        """Return the seconds that a candidate takes besides its training: those of the last one that is not trained."""
        return next(60 * point.minutes for point in reversed(self.workshop.points) if not point.plan.trains)

    def _say_left_out(self, names: list[str], *, again: bool) -> None:
        if names:
            said = f"no time to train {', '.join(names)}{' for longer' if again else ''}"
            self.workshop.left_out.append(f"{said}; a larger --budget would give it")
            self.workshop.progress.line(self.workshop.left_out[-1])


def most_epochs(samples: int) -> list[int]:
    """Return the epochs of each round, at most, by the samples of one."""
    rounds = zip(MOST_EPOCHS, MOST_SAMPLES, strict=True)
    return [max(epochs, math.ceil(least / samples)) for epochs, least in rounds]


def _longer(plan: Plan, epochs: int) -> Plan:
    """Return a plan with one more training after its pruning, if it prunes."""
    return with_epochs(plan, epochs) if plan.widths else plan


def _label(name: str, epochs: Sequence[int]) -> str:
    trained = "+".join(map(str, epochs))
    return f"{name}, {trained} epochs" if trained not in ("", "1") else f"{name}, 1 epoch" if trained else name


def epoch_seconds(model: torch.nn.Module, data: Dataset, device: torch.device) -> float:
    """Return about how many seconds an epoch of finetuning takes on an idle machine, by a step of a copy of a network.

    The first training shows how long it really takes.
    """
    trial = copy_model(model)
    prepare_training(trial, data, device)
    trial.train()
    batch = next(iter(data.referenced(eval_batches(data.validation, data.spec, BATCH))))
    given, targets = tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
    samples, least = min(BATCH, len(data.validation)), float("inf")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with torch.random.fork_rng():
        for _ in range(1 + STEPS):
            start = clock()
            outputs = outputs_of(trial(*place_inputs(given, device, memory_format(trial))))
            loss = data.task.loss(outputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())
            least = min(least, clock() - start)
    return OVERHEAD * least / threads * len(data.train) / samples
