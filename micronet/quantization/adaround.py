"""AdaRound: rounding each weight up or down to keep its layer's output (Nagel et al. 2020, arXiv:2004.10568).

Layer by layer, front to back: h(V) in 0..1 places each weight between its two neighboring levels (equation 23), and V
minimizes the squared error of the layer's output on the quantized network's inputs, plus a term that drives h to 0 or 1
(equation 24). The rounded weights lie on the grid, and its scale is frozen.
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
from micronet.models.modes import eval_mode
from micronet.quantization.functional import broadcast
from micronet.quantization.layers import Quantized
from micronet.quantization.schemes.iao import AffineQuantizer

STEPS = 400
LEARNING_RATE = 0.01
BATCH = 32
WARM_UP = 0.2  # fraction of the steps without the regularizer
BETA = (20.0, 2.0)  # exponent of the regularizer, first and last
LAMBDA = 0.01
STRETCH = (-0.1, 1.1)  # zeta and gamma of the rectified sigmoid


class _LayerData(NamedTuple):
    """A layer's inputs in the quantized network, and its outputs in the float network."""

    inputs: Tensor
    targets: Tensor


def adaround(
    floating: nn.Module, quantized: nn.Module, batches: list[Tensor], progress: Progress | None = None, seed: int = 1
) -> int:
    """Choose the rounding of every weight on a uniform grid, in place, and return the number of layers.

    Args:
        floating: The float network.
        quantized: The same network, quantized and calibrated.
        batches: Calibration inputs.
        progress: Where to report progress.
        seed: For the choice of images in each step.

    Raises:
        MicronetError: No layer has weights on a uniform grid.
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
            "--adaround found no layer with weights on a uniform grid; use --method iao and --w-bits 2 to 16, "
            "without --bn-fuse"
        )
    with eval_mode(floating, quantized):
        names = call_order(quantized, names, batches[0])
        for done, name in enumerate(names, 1):
            data = _record_layer(floating, quantized, name, batches)
            if data is not None:
                _round_layer(quantized.get_submodule(name), data, seed)
            progress.step("choosing the rounding", done, len(names))
    return len(names)


@torch.no_grad()
def call_order(model: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """Return the names of those layers that a forward pass calls, in the order of their first calls."""
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


def _round_layer(layer: Any, data: _LayerData, seed: int) -> None:
    quantizer: AffineQuantizer = layer.weight_quantizer
    weight = layer.weight.detach()
    scale = broadcast(quantizer.scale, weight, quantizer.axis)
    zero = broadcast(quantizer.zero_point, weight, quantizer.axis)
    floor = (weight / scale).floor()
    fraction = (weight / scale - floor).clamp(0.001, 0.999)
    low, high = STRETCH
    v = torch.logit((fraction - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    inputs = data.inputs
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=memory_format(layer))
    for step in range(STEPS):
        chosen = torch.randint(len(data.inputs), (min(BATCH, len(data.inputs)),), generator=generator)
        q = (floor + rectified_sigmoid(v) + zero).clamp(quantizer.qmin, quantizer.qmax)
        out = _compute(layer, inputs[chosen], (q - zero) * scale)
        loss = (out - data.targets[chosen]).square().sum(1).mean() + _regularizer(v, step / STEPS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    up = (rectified_sigmoid(v.detach()) >= 0.5).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(((floor + up + zero).clamp(quantizer.qmin, quantizer.qmax) - zero) * scale)
    quantizer.freeze()


def _regularizer(v: Tensor, share: float) -> Tensor | float:
    if share < WARM_UP:
        return 0.0
    start, end = BETA
    beta = start + (end - start) * (share - WARM_UP) / (1 - WARM_UP)
    return LAMBDA * (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def _compute(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    plain: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    out: Tensor = plain._conv_forward(
        layer, x, weight, layer.bias
    )  # private in torch, but the only way to the layer's padding mode
    return out


@torch.no_grad()
def _record_layer(floating: nn.Module, quantized: nn.Module, name: str, batches: list[Tensor]) -> _LayerData | None:
    """Return a layer's data, or None if it is called several times, since its inputs may differ in size."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    layer: Any = quantized.get_submodule(name)

    def record_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        inputs.append((x if layer.input_quantizer is None else layer.input_quantizer(x)).clone())

    def record_output(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        targets.append(out.clone())  # an in-place ReLU may follow

    handles = [
        layer.register_forward_pre_hook(record_input),
        floating.get_submodule(name).register_forward_hook(record_output),
    ]
    try:
        for network in (floating, quantized):
            for batch in batches:
                network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return _LayerData(torch.cat(inputs), torch.cat(targets)) if len(inputs) == len(batches) else None
