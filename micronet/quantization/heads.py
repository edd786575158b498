"""Heads that 8 bits destroy: layers at the end of a network whose channels differ too much in size for one scale.

A runtime computes a convolution in integers only if its output becomes integers too, with one scale for all channels.
A detector's last convolution may hold box sizes in pixels beside scores of 0 to 1; the scale of the boxes then leaves
the scores a few levels. Behind other layers, training has made the next layer robust to it; behind a head, nothing
repairs it. A head is a layer whose results reach an output of the network through no other layer, nor through a sum
with another layer's results, which has the scale of both.

Networks (``find_destroyed``) and ONNX files (``micronet.onnx.heads``) follow the same law, ``destroyed_channel``.
"""

from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from micronet.graph import ops
from micronet.graph.trace import Graph, trace, trace_both
from micronet.quantization.config import QuantConfig
from micronet.quantization.layers import has_weight_slot

FEWEST_LEVELS = 4
FUSED = ops.ANY_RELU | ops.MAX_POOL | ops.IDENTITY  # what may stand between a layer and the quantizer of its output


class DestroyedHead(NamedTuple):
    """A head, and a channel of its output, counted from 0, of which 8 bits keep nothing."""

    layer: str
    channel: int

    def __str__(self) -> str:
        return f"the 8-bit scale of its output gives channel {self.channel} fewer than {FEWEST_LEVELS} levels"


class ChannelRange:
    """The range of each channel, (C,), of a tensor; ``axis``: of the channels."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low = self.high = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Widen the ranges to the values of ``x``."""
        low, high = torch.aminmax(x.transpose(0, self.axis).flatten(1), dim=1)
        self.low = torch.minimum(self.low, low) if len(self.low) else low
        self.high = torch.maximum(self.high, high) if len(self.high) else high


def destroyed_channel(seen: ChannelRange, step: Tensor | float) -> int | None:
    """Return the channel of which the least is left by rounding to multiples of ``step``, or None.

    Rounding adds noise of variance step^2 / 12. Values spread evenly over n steps have variance n^2 step^2 / 12, so n
    levels are a signal-to-noise ratio of n^2 about the channel's mean: 12 dB for 4 levels, those of 2 bits. The 8-bit
    layers before a head leave 20 dB or more (``micronet quantize`` reports it); below 12 dB, nearly all of the error
    comes from rounding the head itself. Of a constant, the distance from 0 counts instead; 0 is exact.
    """
    varied, whole = (seen.high - seen.low) / step, (seen.high.clamp(min=0) - seen.low.clamp(max=0)) / step
    levels = torch.where(varied > 0, varied, whole)
    levels = torch.where(levels > 0, levels, torch.inf)
    channel = int(levels.argmin()) if levels.numel() else 0
    return channel if levels.numel() and float(levels[channel]) < FEWEST_LEVELS else None


class Head(NamedTuple):
    """A head: its layer, and the range of each channel of its output."""

    layer: str
    seen: ChannelRange


def find_heads(model: nn.Module, config: QuantConfig) -> dict[str, Head]:
    """Return the heads of a quantized network by the quantizer of their output, ``module.slot``.

    ``config``: what the user chose. Layers chosen by name are never taken out again, so there are no heads then.
    """
    if config.first_last != "auto" or config.include is not None or config.keep_8bit is not None:
        return {}
    graph = trace(model) or trace_both(model)  # a network with quantizers of outputs can be traced, as it was before
    if graph is None:
        return {}
    layers = {node: module for node, module in graph.calls() if has_weight_slot(module)}
    computed = set().union(*(graph.reachable(node) for node in layers)) | layers.keys()
    quantizers = {
        node: _output_quantizer(graph, node) for node in layers if _is_head(graph, node, set(layers), computed)
    }
    return {
        place: Head(str(node.target), ChannelRange(-1 if isinstance(layers[node], nn.Linear) else 1))
        for node, place in quantizers.items()
        if place is not None
    }


@torch.no_grad()
def find_destroyed(model: nn.Module, heads: Mapping[str, Head]) -> list[DestroyedHead]:
    """Return the heads whose output quantizer leaves nothing of a channel.

    Args:
        model: A quantized and calibrated network.
        heads: Its heads, whose ranges have seen the calibration inputs.
    """
    found = []
    for place, (layer, seen) in heads.items():
        quantizer: Any = model.get_submodule(place)
        channel = destroyed_channel(seen, quantizer.qparams(torch.empty(0)).scale)
        if channel is not None:
            found.append(DestroyedHead(layer, channel))
    return found


def excluding(config: QuantConfig, heads: list[DestroyedHead]) -> QuantConfig:
    """Return the config that keeps heads in float."""
    names = [config.exclude or "", *(escape(each.layer) for each in heads)]
    return replace(config, exclude=",".join(filter(None, names)))


def _is_head(graph: Graph, layer: fx.Node, layers: set[fx.Node], computed: set[fx.Node]) -> bool:
    """Return True if a layer is a head; ``computed``: all nodes that depend on layers, and those."""
    waiting, seen = [layer], {layer}
    while waiting:
        for reader in graph.readers(waiting.pop()):
            if reader.op == "output":
                return True
            summed = graph.matches(reader, ops.ADD) and len(computed & set(reader.all_input_nodes)) > 1
            if reader not in seen and reader not in layers and not summed:
                seen.add(reader)
                waiting.append(reader)
    return False


def _output_quantizer(graph: Graph, layer: fx.Node) -> str | None:
    """Return the quantizer of a layer's output, behind the norm and the activation that are fused with it."""
    node = layer
    while getattr(graph.module(node), "output_quantizer", None) is None:
        readers = graph.readers(node)
        if len(readers) != 1:
            return None
        [node] = readers
        if not (graph.matches(node, FUSED) or isinstance(graph.module(node), ops.BATCH_NORMS)):
            return None
    return f"{node.target}.output_quantizer"
