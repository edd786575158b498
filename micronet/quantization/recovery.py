"""Accuracy recovery without training: equalization, bias correction and batch-norm re-estimation.

Equalization: Nagel et al. 2019, arXiv:1906.04721, section 4.1. Bias correction: section 4.2 of the same paper, with
data instead of an assumed distribution. Batch-norm re-estimation: Sun et al. 2019, arXiv:1903.11316.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.trace import Graph, trace
from micronet.models.modes import eval_mode
from micronet.quantization.layers import Quantized

EQUALIZATION_ROUNDS = 40
SMALLEST_RANGE = 1e-8  # channels with smaller weights are not equalized


@torch.no_grad()
def equalize(model: nn.Module) -> int:
    """Equalize the weight ranges of consecutive layers, in place, and return the number of pairs.

    Each channel's output weights in one layer and input weights in the next get the same range. The network's outputs
    do not change, because only operations that commute with positive factors lie between (ReLU, pools; not ReLU6).

    Raises:
        MicronetError: The network cannot be traced, or has no such pair, for example because its batch norms are not
            folded.
    """
    graph = trace(model)
    if graph is None:
        raise MicronetError("--equalize needs a network that torch.fx can trace; leave it out")
    pairs = _pairs(graph)
    if not pairs:
        raise MicronetError("--equalize found no two layers separated only by a ReLU; drop --equalize")
    for _ in range(EQUALIZATION_ROUNDS):
        for first, second in pairs:
            _balance(first, second)
    return len(pairs)


def _pairs(graph: Graph) -> list[tuple[Any, Any]]:
    """Return the pairs of layers where the second is the only reader of the first."""
    found = []
    for node, layer in graph.calls():
        if not _has_rows(layer) or graph.call_count(layer) > 1 or not graph.owns_weight(layer):
            continue
        after = _only_reader(graph, node)
        reader = graph.module(after) if after is not None else None
        if after is None or reader is None or not _has_rows(reader) or graph.call_count(reader) > 1:
            continue
        alike = isinstance(layer, nn.Linear) == isinstance(
            reader, nn.Linear
        )  # otherwise the channels are on different axes
        if alike and _columns_of(reader, layer) is not None and graph.owns_weight(reader):
            found.append((layer, reader))
    return found


def _only_reader(graph: Graph, node: fx.Node) -> fx.Node | None:
    """Return the only layer that reads a node, through ReLUs and pools, or None.

    After a linear layer the channels are on the last axis, where a pool would mix them.
    """
    mixes = isinstance(graph.module(node), nn.Linear)
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = graph.module(node)
        if _has_rows(module):
            return node
        relu = graph.matches(node, ops.RELU)
        pools = not mixes and graph.matches(node, ops.MAX_POOL | ops.AVERAGE_POOL)
        if not (relu or pools or isinstance(module, nn.Identity)):
            return None
    return None


def _has_rows(layer: Any) -> bool:
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def _columns_of(reader: Any, layer: Any) -> Tensor | None:
    """Return a view of the reader's weight with the layer's output channels first, or None if they do not match."""
    channels, weight = layer.weight.shape[0], reader.weight
    groups = getattr(reader, "groups", 1)
    if groups == 1:
        return weight.transpose(0, 1) if weight.shape[1] == channels else None
    if groups == channels and weight.shape[0] == channels:  # depthwise
        return weight  # type: ignore[no-any-return]
    return None


def _balance(first: Any, second: Any) -> None:
    columns = _columns_of(second, first)
    assert columns is not None
    out, into = first.weight.flatten(1).abs().amax(1), columns.flatten(1).abs().amax(1)
    factor = torch.where((out > SMALLEST_RANGE) & (into > SMALLEST_RANGE), (out / into).sqrt(), torch.ones_like(out))
    first.weight.div_(factor.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(factor)
    columns.mul_(factor.view(-1, *[1] * (columns.dim() - 1)))


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the statistics of every batch norm to those of the batches, in place, and return the number of batch norms.

    Every image has the same weight, except that batches of one image are skipped, since they have no variance.
    Raises MicronetError if there is no batch norm or no larger batch.
    """
    norms = [module for module in model.modules() if isinstance(module, ops.BATCH_NORMS) and module.track_running_stats]
    if not norms:
        raise MicronetError("--bn-reestimate needs batch norms, and this network has no batch norm; leave it out")
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        with eval_mode(model):
            for norm in norms:
                norm.train()
            for batch in batches:
                if len(batch) > 1:
                    seen += len(batch)
                    for norm in norms:
                        norm.momentum = len(batch) / seen  # 1 for the first batch, which replaces the old statistics
                    model(batch)
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
    places = _places_to_correct(quantized, norms_estimated)
    if not places:
        raise MicronetError(
            "--bias-correct found no quantized layer with a bias or a batch norm after it; leave it out"
        )
    targets = _mean_outputs(floating, places, batches)
    for name, mean in targets.items():
        target, sign = places[name]
        target.add_(mean - _mean_outputs(quantized, [name], batches)[name], alpha=sign)
    return len(targets)


def _places_to_correct(model: nn.Module, norms_estimated: bool) -> dict[str, tuple[Tensor, float]]:
    """Return for each quantized layer the tensor that shifts its mean output, and the sign of the shift."""
    graph = trace(model)
    norms = dict(graph.conv_bn_pairs()) if graph is not None else {}
    places: dict[str, tuple[Tensor, float]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Quantized) or module.weight_quantizer is None:
            continue
        layer: Any = module
        if norms_estimated and name in norms:
            continue
        if layer.bias is not None:
            places[name] = layer.bias, 1.0
        elif name in norms:
            norm: Any = model.get_submodule(norms[name])
            places[name] = norm.running_mean, -1.0
    return places


def _mean_outputs(model: nn.Module, names: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean output per channel, (C,), of each layer, in eval mode and in the order of the first calls."""
    total: dict[str, list[Tensor]] = {}

    def watch(name: str) -> RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
            last = out.dim() == 2 or isinstance(module, nn.Linear)  # the channels are on the last axis
            mean = out.flatten(0, -2).mean(0) if last else out.flatten(2).mean((0, 2))
            total.setdefault(name, []).append(len(out) * mean)

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    images = sum(map(len, batches))
    try:
        with eval_mode(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(means).sum(0) / images for name, means in total.items()}
