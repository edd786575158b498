"""Equalization: consecutive layers get the same weight ranges (Nagel et al. 2019, arXiv:1906.04721, section 4.1)."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.trace import Graph, trace
from micronet.models.device import Example
from micronet.quantization.functional import broadcast

ROUNDS = 40
SMALLEST_RANGE = 1e-8  # channels with smaller weights are not equalized


@torch.no_grad()
def equalize(model: nn.Module, example: Example | None = None) -> int:
    """Equalize the weight ranges of consecutive layers, in place, and return the number of pairs.

    Each channel's output weights in one layer and input weights in the next get the same range. The network's outputs
    do not change, because only operations that commute with positive factors lie between (ReLU, pools; not ReLU6).

    Args:
        model: The network.
        example: An input, or a tuple of inputs, for a forward that must run to be traced.

    Raises:
        MicronetError: The network cannot be traced, or has no such pair, for example because its batch norms are not
            folded.
    """
    graph = trace(model, example)
    if graph is None:
        raise MicronetError("--equalize needs a network that torch.fx can trace; drop --equalize")
    pairs = _pairs(graph)
    if not pairs:
        raise MicronetError("--equalize found no consecutive layers with only a ReLU between them; drop --equalize")
    for _ in range(ROUNDS):
        for layer, columns in pairs:
            out, into = layer.weight.flatten(1).abs().amax(1), columns.flatten(1).abs().amax(1)
            used = (out > SMALLEST_RANGE) & (into > SMALLEST_RANGE)
            factor = torch.where(used, (out / into).sqrt(), 1.0)
            layer.weight.div_(broadcast(factor, layer.weight, 0))
            if layer.bias is not None:
                layer.bias.div_(factor)
            columns.mul_(broadcast(factor, columns, 0))
    return len(pairs)


def _pairs(graph: Graph) -> list[tuple[Any, Tensor]]:
    """Return each layer with one reader, and the reader's weight as a view with that layer's output channels first."""

    def usable(layer: Any) -> bool:
        return isinstance(layer, ops.ROW_LAYERS) and graph.call_count(layer) == 1 and graph.owns_weight(layer)

    found = []
    for node, layer in graph.calls():
        reader = _only_reader(graph, node) if usable(layer) else None
        # Between a convolution and a linear layer, the channels change axes.
        if usable(reader) and isinstance(layer, nn.Linear) == isinstance(reader, nn.Linear):
            columns = _columns_of(reader, layer)
            if columns is not None:
                found.append((layer, columns))
    return found


def _only_reader(graph: Graph, node: fx.Node) -> nn.Module | None:
    """Return the only layer that reads a node, through ReLUs and pools, or None."""
    mixes = isinstance(graph.module(node), nn.Linear)  # a pool would, since the channels are on the last axis
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = graph.module(node)
        if isinstance(module, ops.ROW_LAYERS):
            return module
        relu = graph.matches(node, ops.RELU)
        pools = not mixes and graph.matches(node, ops.MAX_POOL | ops.AVERAGE_POOL)
        if not (relu or pools or isinstance(module, nn.Identity)):
            return None
    return None


def _columns_of(reader: Any, layer: Any) -> Tensor | None:
    """Return a view of the reader's weight with the layer's output channels first, or None if they do not match."""
    channels, weight, groups = len(layer.weight), reader.weight, getattr(reader, "groups", 1)
    if groups == 1 and weight.shape[1] == channels:
        return weight.transpose(0, 1)  # type: ignore[no-any-return]
    if groups == channels == len(weight):  # depthwise
        return weight  # type: ignore[no-any-return]
    return None
