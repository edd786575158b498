"""Accuracy recovery without training: batch-norm re-estimation and bias correction.

Batch-norm re-estimation: Sun et al. 2019, arXiv:1903.11316. Bias correction: Nagel et al. 2019, arXiv:1906.04721,
section 4.2, with data instead of an assumed distribution. Its neighbors are ``equalize`` and ``reconstruct``.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.trace import trace
from micronet.models.device import batch_length, call, head
from micronet.models.modes import eval_mode
from micronet.quantization.layers import Quantized, give_bias


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm to those of the batches, in place, and return the number of batch norms.

    Every image has the same weight, except that batches of one image are skipped, since they have no variance.
    Raises MicronetError if there is no batch norm or no larger batch.
    """
    norms = [module for module in model.modules() if isinstance(module, ops.BATCH_NORMS) and module.track_running_stats]
    if not norms:
        raise MicronetError("--bn-reestimate needs batch norms, but this network has none; drop --bn-reestimate")
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        with eval_mode(model):
            for norm in norms:
                norm.train()
            for batch in batches:
                if (size := batch_length(batch)) > 1:
                    seen += size
                    for norm in norms:
                        norm.momentum = size / seen  # 1 for the first batch, which replaces the old statistics
                    call(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise MicronetError("--bn-reestimate needs a batch of at least two images; use more calibration images")
    return len(norms)


def give_biases(quantized: nn.Module, example: Any) -> list[str]:
    """Give each quantized layer a bias that has none, nor a batch norm after it, in place; return the layers' names.

    ``example``: an input.
    """
    norms = _norms_after(quantized, example)
    given = [name for name, layer in _layers(quantized) if layer.bias is None and name not in norms]
    for name in given:
        give_bias(quantized.get_submodule(name))
    return given


@torch.no_grad()
def correct_biases(
    floating: nn.Module, quantized: nn.Module, batches: list[Any], *, norms_estimated: bool = False
) -> int:
    """Restore each quantized layer's mean output to that in the float network, in place.

    The correction is added to the layer's bias, or without a bias to the running mean of the batch norm after it. Each
    changes what later layers read, so the quantized network runs with the corrections in place: on the way through it,
    the output of every layer is shifted until its mean is that of the float network's on the same batch. The
    correction is the mean of these shifts. With one batch, every mean is restored exactly; with several, up to the
    second order of how much the shifts differ between them.

    Args:
        floating: The float network.
        quantized: The same network, quantized and calibrated.
        batches: Calibration inputs.
        norms_estimated: Skip layers before a batch norm, whose statistics are those of the quantized network already.

    Returns:
        The number of layers corrected.

    Raises:
        MicronetError: No layer can be corrected.
    """
    places = _places_to_correct(quantized, head(batches[0], 2), norms_estimated)
    if not places:
        raise MicronetError("--bias-correct found no quantized layer to correct; drop --bias-correct")
    targets = _mean_outputs(floating, places, batches)
    shifts = _mean_shifts(quantized, targets, batches)
    for name, shift in shifts.items():
        target, sign = places[name]
        target.add_(shift, alpha=sign)
    return len(shifts)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers with quantized weights, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Quantized) and module.weight_quantizer is not None
    ]


def _norms_after(model: nn.Module, example: Any) -> dict[str, str]:
    """Return the batch norm that alone reads a layer's output, by the layer's name."""
    graph = trace(model, example)
    return dict(graph.conv_bn_pairs()) if graph is not None else {}


def _places_to_correct(model: nn.Module, example: Any, norms_estimated: bool) -> dict[str, tuple[Tensor, float]]:
    """Return for each quantized layer the tensor that shifts its mean output, and the sign of the shift."""
    norms = _norms_after(model, example)
    places: dict[str, tuple[Tensor, float]] = {}
    for name, layer in _layers(model):
        if norms_estimated and name in norms:
            continue
        if layer.bias is not None:
            places[name] = layer.bias, 1.0
        elif name in norms:
            norm: Any = model.get_submodule(norms[name])
            places[name] = norm.running_mean, -1.0
    return places


def _mean_outputs(model: nn.Module, names: Iterable[str], batches: list[Any]) -> dict[str, list[Tensor]]:
    """Return the mean output per channel, (C,), of each call of each layer, in eval mode."""
    means: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        means.setdefault(name, []).append(out.mean(_other_axes(module, out)))

    with eval_mode(model), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(record, name)))
        for batch in batches:
            call(model, batch)
    return means


def _mean_shifts(model: nn.Module, targets: dict[str, list[Tensor]], batches: list[Any]) -> dict[str, Tensor]:
    """Return the mean shift per channel, (C,), that gives the output of each call of each layer its target mean."""
    found: dict[str, list[Tensor]] = {name: [] for name in targets}
    sizes: dict[str, list[int]] = {name: [] for name in targets}

    def shift(name: str, layer: nn.Module, out: Tensor) -> Tensor:
        axes = _other_axes(layer, out)
        mean = out.mean(axes, keepdim=True)
        missing = targets[name][len(found[name])].view_as(mean) - mean
        found[name].append(len(out) * missing.flatten())
        sizes[name].append(len(out))
        return out + missing

    with eval_mode(model), ExitStack() as hooks:
        for name in targets:
            layer: Any = model.get_submodule(name)
            if layer.output_quantizer is None:
                hook = layer.register_forward_hook(lambda module, _, out, name=name: shift(name, module, out))
            else:  # which reads the output with the bias
                hook = layer.output_quantizer.register_forward_pre_hook(
                    lambda _, given, name=name, layer=layer: (shift(name, layer, given[0]), *given[1:])
                )
            hooks.enter_context(hook)
        for batch in batches:
            call(model, batch)
    return {name: torch.stack(parts).sum(0) / sum(sizes[name]) for name, parts in found.items()}


def _other_axes(layer: nn.Module, out: Tensor) -> list[int]:
    """Return the axes of a layer's output that are not its channels."""
    channels = out.dim() - 1 if out.dim() == 2 or isinstance(layer, nn.Linear) else 1
    return [axis for axis in range(out.dim()) if axis != channels]
