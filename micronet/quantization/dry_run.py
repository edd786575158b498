"""A dry run of placed quantizers: one without effect, or with values that no grid holds, is found before any use."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError
from micronet.graph.agreement import ROUNDING, agree_if_taken
from micronet.models.device import Example, as_inputs, copied, first_of_large
from micronet.models.modes import eval_mode
from micronet.models.outputs import tensors_in
from micronet.quantization.calibrate import each_quantizer, record_activations, recorded_places
from micronet.quantization.quantizer import Quantizer

NEVER_CALLED = "forward() does not call it for the example inputs, or nothing uses its output"
NO_EFFECT = "its quantized values do not reach the output"
PARTLY_EMPTY = f"{NO_EFFECT}, part of which was empty for the example input"


def find_idle(
    model: nn.Module, example: Example, progress: Progress | None = None, batches: Iterable[Example] = ()
) -> dict[str, str]:
    """Run a network with placed quantizers on an example; return those without effect on it, and on other inputs.

    In the run, quantizers pass their values on, times 1. One that is called, and whose factor the output's gradient
    reaches, has an effect. Where the gradient is zero, NaN in its place decides, and where it is cut off, NaN in place
    of the values: whatever weights of 0 hide, NaN gets through. A network that has no gradient, as an operation in
    place may overwrite what the gradient needs, is tried with NaN alone. Of large inputs, one sample is enough if all
    have an effect on it.

    Args:
        model: The network, calibrated or not.
        example: An input, or a tuple of inputs.
        progress: Where to report progress.
        batches: Other inputs, for layers that compute only some samples, such as those of a mixture of experts.

    Returns:
        The quantizers without effect, ``module.slot``, and the reason.

    Raises:
        MicronetError: The network returned nothing but empty tensors, as a detector that finds no object.
        Exception: Whatever the network's forward raises.
    """
    progress, first = progress or Silent(), first_of_large(example)
    if first is not None:
        with suppress(Exception):  # a user's forward may need all samples, or find something in the others only
            if not _idle(model, first, progress):
                return {}
    idle, quantizers = _idle(model, example, progress), _quantizers(model)
    for batch in batches:
        if not idle:
            break
        inputs = as_inputs(model, batch)
        outputs, _ = _run(model, inputs, quantizers, gradient=False)
        unused = _without_effect(model, inputs, outputs, list(idle), progress)
        idle = {name: why for name, why in idle.items() if name in unused}
    return idle


def keeps_outputs(model: nn.Module, quantized: nn.Module, example: Example) -> bool:
    """Return True if a network with placed quantizers that pass their values on returns what it did without them."""
    with _passing(_quantizers(quantized), {}):
        return agree_if_taken(model, quantized, as_inputs(model, example), ROUNDING)


def _quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {f"{name}.{slot}": quantizer for name, slot, quantizer in each_quantizer(model)}


def _idle(model: nn.Module, example: Example, progress: Progress) -> dict[str, str]:
    progress.step("checking the quantizers", 0, 1)
    quantizers, inputs = _quantizers(model), as_inputs(model, example)
    try:
        outputs, factors = _run(model, inputs, quantizers, gradient=True)
        waiting = _without_gradient(outputs, factors)
    except RuntimeError:  # inference may allow what autograd does not
        outputs, factors = _run(model, inputs, quantizers, gradient=False)
        waiting = list(factors)
    if not any(out.numel() for out in outputs):
        raise MicronetError(
            "the network's output is empty for the example input, so the effect of its quantizers cannot be seen; pass "
            "inputs for which it returns something with --data (a detector: images with objects) or, if its weights "
            "are not trained yet, lower the score threshold in the network"
        )
    idle = {name: NEVER_CALLED for name in quantizers if name not in factors}
    why = NO_EFFECT if all(out.numel() for out in outputs) else PARTLY_EMPTY
    return idle | dict.fromkeys(_without_effect(model, inputs, outputs, waiting, progress), why)


def _without_effect(
    model: nn.Module, inputs: tuple[Any, ...], outputs: list[Tensor], waiting: list[str], progress: Progress
) -> list[str]:
    """Return the quantizers whose values can be NaN without a change in the outputs."""
    quantizers, found = _quantizers(model), list[str]()
    together = len(waiting)  # how many to try in one run: most of them are without effect, or most have one
    while waiting:
        some = waiting[:together]
        progress.step("checking the quantizers", len(quantizers) - len(waiting), len(quantizers))
        unchanged = _unchanged(model, inputs, outputs, quantizers, some)
        if unchanged:
            found += some
        if unchanged or len(some) == 1:
            waiting = waiting[len(some) :]
        together = 2 * len(some) if unchanged else max(1, len(some) // 2)
    return found


def _unchanged(
    model: nn.Module,
    inputs: tuple[Any, ...],
    outputs: list[Tensor],
    quantizers: dict[str, Quantizer],
    poisoned: Collection[str],
) -> bool:
    """Return True if a network returns the same with NaN in place of some quantizers' values."""
    with eval_mode(model), _passing(quantizers, {}, poisoned), torch.no_grad():
        try:
            others = tensors_in(model(*copied(inputs)))
        except Exception:  # such as the maximum of the scores above a threshold, which NaN never is
            return False
    return all(torch.equal(x, y) for x, y in zip(outputs, others, strict=True))


def _run(
    model: nn.Module, inputs: tuple[Any, ...], quantizers: dict[str, Quantizer], *, gradient: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs of a network and the factors of the quantizers that it calls."""
    factors: dict[str, Tensor] = {}
    with eval_mode(model), _passing(quantizers, factors), torch.set_grad_enabled(gradient):
        return tensors_in(model(*copied(inputs))), factors


def find_infinite(model: nn.Module, batches: Iterable[Example]) -> set[str]:
    """Return the activation quantizers, ``module.slot``, that infinity reaches, but no NaN, in the float network.

    Signs are left out: infinity has one.
    """
    found: set[str] = set()

    def look(name: str, x: Tensor) -> None:
        if not x.is_complex() and bool(x.isinf().any()) and not bool(x.isnan().any()):
            found.add(name)

    record_activations(model, batches, {name: partial(look, name) for name in recorded_places(model)})
    return found


@contextmanager
def _passing(
    quantizers: dict[str, Quantizer], factors: dict[str, Tensor], poisoned: Collection[str] = ()
) -> Iterator[None]:
    """Make quantizers pass on their values times factors, which ``factors`` receives; those poisoned have NaN."""

    def forward(name: str) -> Any:
        def pass_on(x: Tensor, *, rectified: bool = False) -> Tensor:
            if not x.is_floating_point():  # no grid rounds complex numbers, and integers are places in a table
                return x
            if name not in factors:
                value = torch.tensor(torch.nan if name in poisoned else 1.0, device=x.device, dtype=x.dtype)
                factors[name] = value.requires_grad_(torch.is_grad_enabled())
            return (x.relu() if rectified else x) * factors[name]

        return pass_on

    for name, quantizer in quantizers.items():
        quantizer.__dict__["forward"] = forward(name)
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.__dict__["forward"]


@torch.enable_grad()
def _without_gradient(outputs: list[Tensor], factors: dict[str, Tensor]) -> list[str]:
    """Return the quantizers whose factors do not change the outputs as far as the gradient says.

    NaN as the outputs' gradient passes through weights of 0, as NaN among the values does.
    """
    draws = torch.Generator().manual_seed(0)  # the caller's own draws stay as they are
    total = sum(
        (out * torch.rand(out.shape, generator=draws).to(out)).sum()
        for out in outputs
        if out.requires_grad and out.numel()  # a detector may find nothing
    )
    if not isinstance(total, Tensor) or not factors:
        return list(factors)
    for start in (1.0, torch.nan):
        gradients = torch.autograd.grad(
            total, list(factors.values()), torch.full_like(total, start), retain_graph=True, allow_unused=True
        )
        pairs = zip(factors.items(), gradients, strict=True)
        factors = {name: factor for (name, factor), grad in pairs if grad is None or not bool(grad)}
        if not factors:
            break
    return list(factors)
