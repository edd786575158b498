"""AdaRound: rounding each weight up or down to keep its layer's output (Nagel et al. 2020, arXiv:2004.10568).

Layer by layer, front to back: h(V) in 0..1 places each weight between its two neighboring levels (equation 23), and V
minimizes the squared error of the layer's output on the quantized network's inputs, plus a term that drives h to 0 or 1
(equation 24). The rounded weights lie on the grid, and its scale is frozen.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError
from micronet.models.device import memory_format
from micronet.models.modes import eval_mode
from micronet.quantization.functional import broadcast
from micronet.quantization.layers import ROW_LAYERS, Quantized
from micronet.quantization.schemes.iao import AffineQuantizer

STEPS = 400
LEARNING_RATE = 0.01
BATCH = 32
WARM_UP = 0.2  # fraction of the steps without the regularizer
BETA = (20.0, 2.0)  # exponent of the regularizer, first and last
LAMBDA = 0.01
STRETCH = (-0.1, 1.1)  # zeta and gamma of the rectified sigmoid


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
        and isinstance(module, ROW_LAYERS)
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
            inputs, targets = _record_layer(floating, quantized, name, batches)
            if len(inputs) == len(batches):  # a layer that is called several times may get inputs of several sizes
                layer, plain = quantized.get_submodule(name), floating.get_submodule(name)
                _round_layer(layer, plain, torch.cat(inputs), torch.cat(targets), seed)
            progress.step("choosing the rounding", done, len(names))
    return len(names)


@torch.no_grad()
def call_order(model: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """Return the names of those layers that a forward pass calls, in the order of their first calls."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for name in names:
            watch = partial(lambda name, *_: order.setdefault(name), name)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(watch))
        model(images)
    return list(order)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V) in 0..1 (equation 23)."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def _round_layer(layer: Any, plain: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> None:
    quantizer: AffineQuantizer = layer.weight_quantizer
    weight: Tensor = layer.weight.detach()
    scale = broadcast(quantizer.scale, weight, quantizer.axis)
    zero = broadcast(quantizer.zero_point, weight, quantizer.axis)
    floor = (weight / scale).floor()
    fraction = (weight / scale - floor).clamp(0.001, 0.999)
    low, high = STRETCH
    v = torch.logit((fraction - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)

    def on_grid(up: Tensor) -> Tensor:
        return ((floor + up + zero).clamp(quantizer.qmin, quantizer.qmax) - zero) * scale

    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=memory_format(layer))
    for step in range(STEPS):
        chosen = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)
        out = functional_call(plain, {"weight": on_grid(rectified_sigmoid(v))}, (inputs[chosen],))
        loss = (out - targets[chosen]).square().sum(1).mean() + _regularizer(v, step / STEPS)
        (v.grad,) = torch.autograd.grad(loss, [v])
        optimizer.step()
    up = (rectified_sigmoid(v.detach()) >= 0.5).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(on_grid(up))
    quantizer.freeze()


def _regularizer(v: Tensor, share: float) -> Tensor | float:
    if share < WARM_UP:
        return 0.0
    start, end = BETA
    beta = start + (end - start) * (share - WARM_UP) / (1 - WARM_UP)
    return LAMBDA * (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


@torch.no_grad()
def _record_layer(
    floating: nn.Module, quantized: nn.Module, name: str, batches: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a layer's inputs in the quantized network, and its outputs in the float network."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    layer: Any = quantized.get_submodule(name)

    def record_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        inputs.append((x if layer.input_quantizer is None else layer.input_quantizer(x)).clone())

    def record_output(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        targets.append(out.clone())  # an in-place ReLU may follow

    hook = floating.get_submodule(name).register_forward_hook(record_output)
    with hook, layer.register_forward_pre_hook(record_input):
        for network in (floating, quantized):
            for batch in batches:
                network(batch)
    return inputs, targets
