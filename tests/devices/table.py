"""The table of device checks: what a row is, how rows are entered, and how two devices' numbers are compared.

A check runs what a network can go through on one device. Its numbers on another device must be the same: to the last
bit on the mock device (``test_devices``), within a tolerance on a GPU (``scripts/gpu_check``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from micronet.data.batches import eval_batches
from micronet.evaluation.accuracy import evaluating
from tests.devices.network import dataset

CPU = torch.device("cpu")
# Tolerances: the largest relative difference of a GPU's numbers from the CPU's. Sums of the same float32 terms in
# another order differ by 1e-7; scores after a short training with SGD by 4e-7 (measured: oneDNN against torch's own
# kernels).
FLOAT = 1e-4
LEVEL = 1 / 15  # a value at the edge of a level may land on the next one, and 4 bits have 15 steps
SIGN = 0.5  # such a value of a binary network changes its sign
HALF = 0.02  # bfloat16 has 8 bits of precision, and a GPU's autocast casts other operators than the CPU's
ADAM = 0.2  # Adam divides by the gradient's size: if that is rounding noise, whole steps have a random sign


@dataclass
class Outcome:
    """What a check gave.

    Attributes:
        numbers: Scores, losses and the like, on the CPU; they are compared on every device.
        state: The network's tensors, on the CPU; they are compared if the numbers must be equal.
    """

    numbers: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)


Procedure = Callable[..., Outcome]  # takes a device, a folder for its files, and options


@dataclass
class Check:
    """One row of the table.

    Attributes:
        procedure: What to run, on a device and in a folder.
        tolerance: The largest relative difference of a GPU's numbers from the CPU's; None: the check needs no CPU run.
    """

    procedure: Procedure
    tolerance: float | None

    def run(self, device: torch.device) -> Outcome:
        """Run the check with a seed and a folder of its own."""
        torch.manual_seed(0)
        with TemporaryDirectory() as folder:
            return self.procedure(device, Path(folder))


_checks: dict[str, Check] = {}


def all_checks() -> dict[str, Check]:
    """Return the table: name -> check."""
    import_module("tests.devices.checks")
    import_module("tests.devices.stages")
    return _checks


def check(name: str, tolerance: float | None, **options: Any) -> Callable[[Procedure], Procedure]:
    """Enter a function into the table, called with ``options``; a function may have several rows."""

    def enter(function: Procedure) -> Procedure:
        _checks[name] = Check(partial(function, **options), tolerance)
        return function

    return enter


def outcome(model: nn.Module, **numbers: Any) -> Outcome:
    """Return a network's scores on the test images, more numbers, and the network's state."""
    images, _ = next(eval_batches(dataset().test, dataset().spec))
    with evaluating(model) as predict:
        scores = torch.from_numpy(predict(images.numpy()))
    found = {name: torch.as_tensor(value, dtype=torch.float64).cpu() for name, value in numbers.items()}
    return Outcome({"scores": scores, **found}, {name: x.detach().cpu() for name, x in model.state_dict().items()})


def difference(found: Outcome, reference: Outcome) -> float:
    """Return the largest relative difference (in Euclidean norm) of two outcomes' numbers."""
    assert found.numbers.keys() == reference.numbers.keys()
    worst = 0.0
    for name, expected in reference.numbers.items():
        expected, actual = expected.double(), found.numbers[name].double()
        assert expected.shape == actual.shape, name
        worst = max(worst, float((actual - expected).norm() / expected.norm().clamp(min=1e-12)))
    return worst


def changed(found: Outcome, reference: Outcome) -> list[str]:
    """Return the names of the numbers and tensors that are not bit-identical in two outcomes."""
    pairs = [(found.numbers, reference.numbers), (found.state, reference.state)]
    assert all(left.keys() == right.keys() for left, right in pairs)
    return [name for left, right in pairs for name in left if not torch.equal(left[name].cpu(), right[name].cpu())]
