"""Weights rounded up or down as their layer's output asks (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

Layer by layer, front to back: with w between two levels, h(V) in 0..1 says how far up (equation 23), and V minimises
the squared error of the layer's output on the quantized network's own input, plus a term that drives h to 0 or 1
(equation 24). The rounded weight then lies on the grid, whose scale is frozen.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError
from micronet.models.device import memory_format
from micronet.quantization.functional import broadcast
from micronet.quantization.layers import Quantized
from micronet.quantization.schemes.iao import AffineQuantizer

STEPS = 400
LEARNING_RATE = 0.01
BATCH = 32
WARM_UP = 0.2  # share of the steps before h is driven to its ends
BETA = (20.0, 2.0)  # the exponent of the regulariser, from and to
LAMBDA = 0.01
STRETCH = (-0.1, 1.1)  # zeta and gamma of the rectified sigmoid


class _Seen(NamedTuple):
    inputs: Tensor
    wanted: Tensor


def adaround(
    floating: nn.Module, quantized: nn.Module, batches: list[Tensor], progress: Progress | None = None, seed: int = 1
) -> int:
    """Choose the rounding of every quantized weight on a uniform grid, in place; return how many layers there were.

    Raises MicronetError where there is none.
    """
    progress = progress or Silent()
    names = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, Quantized)
        and isinstance(module.weight_quantizer, AffineQuantizer)
        and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        and module.norm is None
    ]
    if not names:
        raise MicronetError(
            "--adaround: no layer has weights on a uniform grid with a rounding to choose; it needs --method iao, "
            "--w-bits of 2 to 16, and no --bn-fuse"
        )
    names = call_order(quantized.eval(), names, batches[0])
    for done, name in enumerate(names, 1):
        seen = _watch(floating, quantized, name, batches)
        if seen is not None:
            _round_layer(quantized.get_submodule(name), seen, seed)
        progress.step("choosing the rounding", done, len(names))
    return len(names)


@torch.no_grad()
def call_order(model: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """Return the names of the layers that a forward pass calls, in the order of their first calls."""
    order: dict[str, None] = {}

    def watch(name: str) -> RemovableHandle:
        return model.get_submodule(name).register_forward_pre_hook(lambda *_: order.setdefault(name))

    handles = [watch(name) for name in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V) in 0..1 (equation 23)."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def _round_layer(layer: Any, seen: _Seen, seed: int) -> None:
    quantizer: AffineQuantizer = layer.weight_quantizer
    weight = layer.weight.detach()
    scale = broadcast(quantizer.scale, weight, quantizer.axis)
    zero = broadcast(quantizer.zero_point, weight, quantizer.axis)
    floor = (weight / scale).floor()
    rest = (weight / scale - floor).clamp(0.001, 0.999)
    low, high = STRETCH
    v = torch.logit((rest - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    inputs = seen.inputs
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=memory_format(layer))
    for step in range(STEPS):
        some = torch.randint(len(seen.inputs), (min(BATCH, len(seen.inputs)),), generator=generator)
        q = (floor + rectified_sigmoid(v) + zero).clamp(quantizer.qmin, quantizer.qmax)
        out = _compute(layer, inputs[some], (q - zero) * scale)
        loss = (out - seen.wanted[some]).square().sum(1).mean() + _regulariser(v, step / STEPS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    up = (rectified_sigmoid(v.detach()) >= 0.5).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(((floor + up + zero).clamp(quantizer.qmin, quantizer.qmax) - zero) * scale)
    quantizer.freeze()


def _regulariser(v: Tensor, share: float) -> Tensor | float:
    if share < WARM_UP:
        return 0.0
    start, end = BETA
    beta = start + (end - start) * (share - WARM_UP) / (1 - WARM_UP)
    return LAMBDA * (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def _compute(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    plain: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    out: Tensor = plain._conv_forward(layer, x, weight, layer.bias)  # with the layer's own kind of padding
    return out


@torch.no_grad()
def _watch(floating: nn.Module, quantized: nn.Module, name: str, batches: list[Tensor]) -> _Seen | None:
    """Return the layer's input in the quantized network, and what it gave in the float one.

    None where it is called several times: its calls' inputs need not be of one size.
    """
    inputs: list[Tensor] = []
    wanted: list[Tensor] = []
    layer: Any = quantized.get_submodule(name)

    def reads(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        inputs.append((x if layer.input_quantizer is None else layer.input_quantizer(x)).clone())

    def gives(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        wanted.append(out.clone())  # an in-place ReLU may come next

    handles = [
        layer.register_forward_pre_hook(reads),
        floating.get_submodule(name).register_forward_hook(gives),
    ]
    try:
        for network in (floating.eval(), quantized.eval()):
            for batch in batches:
                network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(torch.cat(inputs), torch.cat(wanted)) if len(inputs) == len(batches) else None
