"""Learned rounding: each weight goes up or down to keep an output (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

h(V) in 0..1 places each weight between its two neighboring levels (equation 23), and V minimizes the squared error of
an output, plus a term that drives h to 0 or 1 (equation 24). The output is a layer's, or that of a block of layers
(BRECQ, Li et al. 2021, arXiv:2102.05426). In a block, activations are quantized too, with learned scales, but each
value stays float with probability 1/2 in each step (QDrop, Wei et al. 2022, arXiv:2203.05740). ``reconstruct`` calls
this module for the layers or the blocks of a network.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress
from micronet.models.device import memory_format
from micronet.models.uncompiled import uncompiled_optimizer
from micronet.quantization.functional import QParams, broadcast, learned_step
from micronet.quantization.layers import ACTIVATION_SLOTS
from micronet.quantization.schemes.iao import AffineQuantizer

_Adam = uncompiled_optimizer(torch.optim.Adam)
STEPS = 400
LEARNING_RATE = 0.01
SCALE_LEARNING_RATE = 1e-3  # of the logarithms of activation scales; falls to 0 along a cosine
BATCH = 32
WARM_UP = 0.2  # fraction of the steps without the regularizer
BETA = (20.0, 2.0)  # exponent of the regularizer, first and last
LAMBDA = 0.01
STRETCH = (-0.1, 1.1)  # zeta and gamma of the rectified sigmoid


class Recorded(NamedTuple):
    """What a unit, a layer or a block, reads and should give; the first axis is the images."""

    inputs: Tensor  # in the quantized network
    targets: Tensor  # the output in the float network
    plain: Tensor | None = None  # the inputs in the float network, to mix with ``inputs``


@dataclass
class Unit:
    """What is learned together.

    Attributes:
        module: Computes the output from the input.
        layers: Its layers with weights to round, all of them on affine grids.
        activations: (module, slot) of the activation quantizers to learn the scales of.
    """

    module: nn.Module
    layers: Sequence[nn.Module]
    activations: Sequence[tuple[nn.Module, str]] = field(default=())


class Work(NamedTuple):
    """The part of the progress that a unit is."""

    progress: Progress
    done: int
    total: int


def learn_rounding(unit: Unit, recorded: Recorded, seed: int, work: Work) -> None:
    """Learn the rounding of a unit's weights, and its activations' scales, in place; both are frozen then."""
    roundings = [SoftRounding(layer) for layer in unit.layers]
    generator = torch.Generator().manual_seed(seed)
    droppings = [_Dropping(getattr(module, slot), generator) for module, slot in unit.activations]
    places = [(layer, "weight_quantizer") for layer in unit.layers]
    with replaced([*places, *unit.activations], [*roundings, *droppings]):
        _minimize(unit.module, recorded, roundings, droppings, generator, work)
    for layer, rounding in zip(unit.layers, roundings, strict=True):
        with torch.no_grad():
            layer.weight.copy_(rounding.hard())  # type: ignore[operator]  # mypy knows tensors and modules
        layer.weight_quantizer.freeze()  # type: ignore[operator, union-attr]
    for dropping in droppings:
        dropping.keep()


def _minimize(
    unit: nn.Module,
    recorded: Recorded,
    roundings: list["SoftRounding"],
    droppings: list["_Dropping"],
    generator: torch.Generator,
    work: Work,
) -> None:
    inputs, targets, plain = recorded
    layout = memory_format(unit) if inputs.dim() == 4 else torch.contiguous_format
    inputs = inputs.contiguous(memory_format=layout)
    plain = None if plain is None else plain.contiguous(memory_format=layout)
    rounding = [item.v for item in roundings]
    scales = [item.log_scale for item in droppings]
    optimizers: list[torch.optim.Optimizer] = [_Adam(rounding, lr=LEARNING_RATE)]
    if scales:
        optimizers.append(_Adam(scales, lr=SCALE_LEARNING_RATE))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)
        x = inputs[chosen] if plain is None else mixed(inputs[chosen], plain[chosen], generator)
        loss = (unit(x) - targets[chosen]).square().sum(1).mean()
        loss = loss + sum(_regularizer(v, step / STEPS) for v in rounding)
        for parameter, gradient in zip(
            [*rounding, *scales], torch.autograd.grad(loss, [*rounding, *scales]), strict=True
        ):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        if scales:
            decay.step()
        work.progress.step("learning the rounding", work.done * STEPS + step + 1, work.total * STEPS)


class SoftRounding(nn.Module):
    """Stands in for a weight quantizer while the rounding is learned; V starts where h(V) gives the float weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        quantizer: AffineQuantizer = layer.weight_quantizer
        weight: Tensor = layer.weight.detach()
        self.range = quantizer.qmin, quantizer.qmax
        self.scale = broadcast(quantizer.scale, weight, quantizer.axis)
        self.zero = broadcast(quantizer.zero_point, weight, quantizer.axis)
        self.floor = (weight / self.scale).floor()
        fraction = (weight / self.scale - self.floor).clamp(0.001, 0.999)
        low, high = STRETCH
        self.v = nn.Parameter(torch.logit((fraction - low) / (high - low)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that V stands for; ``weight``, from which V started, is not read."""
        return self._on_grid(rectified_sigmoid(self.v))

    def hard(self) -> Tensor:
        """Return the weight with each value on the level that V is nearer to."""
        return self._on_grid((rectified_sigmoid(self.v.detach()) >= 0.5).to(self.v.dtype))

    def _on_grid(self, up: Tensor) -> Tensor:
        return ((self.floor + up + self.zero).clamp(*self.range) - self.zero) * self.scale


class _Dropping(nn.Module):
    """Stands in for an activation quantizer: a learned scale, and each value stays float with probability 1/2."""

    def __init__(self, quantizer: AffineQuantizer, generator: torch.Generator) -> None:
        super().__init__()
        self._quantizer = [quantizer]  # in a list, so that it is not a submodule
        self._generator = generator
        self.log_scale = nn.Parameter(quantizer.scale.log())
        zero = int(quantizer.zero_point)
        self.range = quantizer.qmin - zero, quantizer.qmax - zero  # q - zero_point, so that the grid's zero is 0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with about half of its values on the grid."""
        scale = self.log_scale.exp()
        grid = QParams(scale, torch.zeros_like(scale), *self.range, None)
        return mixed(learned_step(x, grid, 1.0), x, self._generator)

    def keep(self) -> None:
        """Give the learned scale to the quantizer."""
        quantizer, scale = self._quantizer[0], float(self.log_scale.detach().exp())
        low, high = self.range
        low = max(low, -high) if quantizer.symmetric else low  # a symmetric range ends at the level qmax
        quantizer.set_range(low * scale, high * scale)


def mixed(x: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor whose values come from ``x`` or, with probability 1/2 each, from ``other``.

    The generator is the CPU's, so that every device draws the same. One random number serves eight values.
    """
    words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(generator=generator)
    from_x = words.view(torch.uint8)[: x.numel()].bitwise_and(1).bool().view(x.shape)
    return torch.where(from_x.to(x.device), x, other)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V) in 0..1 (equation 23)."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def _regularizer(v: Tensor, share: float) -> Tensor | float:
    if share < WARM_UP:
        return 0.0
    start, end = BETA
    beta = start + (end - start) * (share - WARM_UP) / (1 - WARM_UP)
    return LAMBDA * (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def with_float_activations(layer: nn.Module) -> AbstractContextManager[None]:
    """Inside this context, a layer quantizes neither its inputs nor its outputs."""
    return replaced([(layer, slot) for slot in ACTIVATION_SLOTS], [None] * len(ACTIVATION_SLOTS))


@contextmanager
def replaced(places: Sequence[tuple[nn.Module, str]], others: Sequence[nn.Module | None]) -> Iterator[None]:
    """Inside this context, the slots of some modules hold other quantizers, or none."""
    own = [getattr(module, slot) for module, slot in places]
    try:
        for (module, slot), other in zip(places, others, strict=True):
            setattr(module, slot, other)
        yield
    finally:
        for (module, slot), quantizer in zip(places, own, strict=True):
            setattr(module, slot, quantizer)
