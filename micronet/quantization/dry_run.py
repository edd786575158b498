"""A dry run of placed quantizers: one without effect, or with values that no grid holds, is found before any use."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from micronet.models.device import Example, as_inputs
from micronet.models.modes import eval_mode
from micronet.models.outputs import tensors_in
from micronet.quantization.calibrate import each_quantizer, record_activations, recorded_places
from micronet.quantization.quantizer import Quantizer

NEVER_CALLED = "forward() never applies its quantizer"
NO_EFFECT = "its quantized values do not reach the output"


def find_idle(model: nn.Module, example: Example) -> dict[str, str]:
    """Run a network with placed quantizers on an example; return those without effect.

    In the run, quantizers pass their values on, times 1. One that is called, and whose factor the output's gradient
    reaches, has an effect. Where the gradient is zero or cut off, NaN in place of the values decides: whatever weights
    of 0 hide, NaN gets through.

    Args:
        model: The network, calibrated or not.
        example: An input, or a tuple of inputs.

    Returns:
        The quantizers without effect, ``module.slot``, and the reason.

    Raises:
        Exception: Whatever the network's forward raises.
    """
    quantizers = {f"{name}.{slot}": quantizer for name, slot, quantizer in each_quantizer(model)}
    factors: dict[str, Tensor] = {}
    inputs = as_inputs(model, example)
    with eval_mode(model), _passing(quantizers, factors), torch.enable_grad():
        outputs = tensors_in(model(*_copies(inputs)))
    idle = {name: NEVER_CALLED for name in quantizers if name not in factors}
    for name in _without_gradient(outputs, factors):
        with eval_mode(model), _passing(quantizers, {}, poisoned=name), torch.no_grad():
            others = tensors_in(model(*_copies(inputs)))
        if all(torch.equal(x, y) for x, y in zip(outputs, others, strict=True)):
            idle[name] = NO_EFFECT
    return idle


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
def _passing(quantizers: dict[str, Quantizer], factors: dict[str, Tensor], poisoned: str = "") -> Iterator[None]:
    """Make quantizers pass on their values times factors, which ``factors`` receives; the poisoned one's is NaN."""

    def forward(name: str) -> Any:
        def pass_on(x: Tensor, *, rectified: bool = False) -> Tensor:
            if x.is_complex():  # no grid rounds it
                return x
            if name not in factors:
                value = torch.tensor(torch.nan if name == poisoned else 1.0, device=x.device, dtype=x.dtype)
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
    """Return the quantizers whose factors do not change the outputs as far as the gradient says."""
    draws = torch.Generator().manual_seed(0)  # the caller's own draws stay as they are
    total = sum((out * torch.rand(out.shape, generator=draws).to(out)).sum() for out in outputs if out.requires_grad)
    if not isinstance(total, Tensor) or not factors:
        return list(factors)
    gradients = torch.autograd.grad(total, list(factors.values()), allow_unused=True)
    return [name for name, grad in zip(factors, gradients, strict=True) if grad is None or not bool(grad)]


def _copies(inputs: tuple[Any, ...]) -> list[Any]:
    """Return inputs that the network may change in place."""
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]
