"""What surrounds a training: where it runs, and what a stage adds to it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from micronet.core.progress import Progress, Silent

Observe = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TrainHooks:
    """What a stage adds to plain training.

    Args:
        observe: A context around the steps of each epoch.
        penalty: Called between backward and the optimizer's step; adds to the gradients.
        keep: Which epoch's weights are the result: the best on the validation images, or the last.
        config: The stage's own settings; a training is resumed only with the same ones.
    """

    observe: Observe = nullcontext
    penalty: Callable[[], None] | None = None
    keep: Literal["best", "last"] = "best"
    config: dict[str, Any] = field(default_factory=dict)


NO_HOOKS = TrainHooks()


@dataclass(frozen=True)
class RunContext:
    """Where and how a training runs; nothing here changes its result except the seed.

    Args:
        output: The artifact's path; the checkpoint and the log are written beside it.
        deadline: When to stop, in seconds of ``time.monotonic``.
        checkpoint_minutes: Minutes between checkpoints within an epoch; 0: after every step.
        compiled: Run the network through torch.compile.
    """

    output: Path
    device: torch.device
    seed: int = 1
    resume: bool = False
    force: bool = False
    progress: Progress = Silent()  # noqa: RUF009  # it has no state
    deadline: float = math.inf
    checkpoint_minutes: float = 10.0
    compiled: bool = False
