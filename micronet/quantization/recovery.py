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
from micronet.quantization.layers import Quantized


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


@torch.no_grad()
def correct_biases(
    floating: nn.Module, quantized: nn.Module, batches: list[Tensor], *, norms_estimated: bool = False
) -> int:
    """Restore each quantized layer's mean output to that in the float network, in place, front to back.

    The correction is added to the layer's bias, or without a bias to the running mean of the batch norm after it.

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
        raise MicronetError(
            "--bias-correct found no quantized layer with a bias or a batch norm after it; drop --bias-correct"
        )
    targets = _mean_outputs(floating, places, batches)
    for name, mean in targets.items():
        target, sign = places[name]
        target.add_(mean - _mean_outputs(quantized, [name], batches)[name], alpha=sign)
    return len(targets)


def _places_to_correct(model: nn.Module, example: Tensor, norms_estimated: bool) -> dict[str, tuple[Tensor, float]]:
    """Return for each quantized layer the tensor that shifts its mean output, and the sign of the shift."""
    graph = trace(model, example)
    norms = dict(graph.conv_bn_pairs()) if graph is not None else {}
    places: dict[str, tuple[Tensor, float]] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if not isinstance(module, Quantized) or layer.weight_quantizer is None or (norms_estimated and name in norms):
            continue
        if layer.bias is not None:
            places[name] = layer.bias, 1.0
        elif name in norms:
            norm: Any = model.get_submodule(norms[name])
            places[name] = norm.running_mean, -1.0
    return places


def _mean_outputs(model: nn.Module, names: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean output per channel, (C,), of each layer, in eval mode and in the order of the first calls."""
    sums: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        last = out.dim() == 2 or isinstance(module, nn.Linear)  # the channels are on the last axis
        mean = out.flatten(0, -2).mean(0) if last else out.flatten(2).mean((0, 2))
        sums.setdefault(name, []).append(len(out) * mean)

    with eval_mode(model), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(record, name)))
        for batch in batches:
            call(model, batch)
    images = sum(map(batch_length, batches))
    return {name: torch.stack(parts).sum(0) / images for name, parts in sums.items()}
