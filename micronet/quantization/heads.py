"""Heads that 8 bits destroy: last convolutions whose channels differ so much in size that one scale cannot serve them.

A runtime computes a convolution in integers only if its output becomes integers too, with one scale for all channels.
A detector's last convolution may hold box sizes in pixels beside scores of 0 to 1; the scale of the boxes then leaves
the scores a few levels. Behind other layers, training has made the next layer robust to it; behind the last layer,
nothing repairs it.
"""

from dataclasses import replace
from glob import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.graph.trace import trace
from micronet.models.device import head
from micronet.quantization.calibrate import record_activations
from micronet.quantization.config import QuantConfig
from micronet.quantization.layers import has_weight_slot

FEWEST_LEVELS = 4  # between a channel's extremes and 0; fewer than those of 2 bits keep nothing of its values


class DestroyedHead(NamedTuple):
    """A last layer, and a channel of its output, counted from 0, of which 8 bits keep nothing."""

    layer: str
    channel: int
    constant: bool

    def __str__(self) -> str:
        if self.constant:
            return f"the 8-bit scale of its output makes channel {self.channel} constant"
        return f"the 8-bit scale of its output gives channel {self.channel} fewer than {FEWEST_LEVELS} levels"


@torch.no_grad()
def find_destroyed(model: nn.Module, batches: list[Tensor], config: QuantConfig) -> list[DestroyedHead]:
    """Return the last layers whose output quantizer leaves nothing of a channel.

    That is a channel whose values, with 0, span fewer than ``FEWEST_LEVELS`` levels, or vary by less than one.

    Args:
        model: A quantized and calibrated network.
        batches: The calibration inputs.
        config: What the user chose; who chose layers gets them.
    """
    if config.first_last != "auto" or config.include is not None or config.keep_8bit is not None:
        return []
    graph = trace(model, head(batches[0], 2))
    if graph is None:
        return []
    layers = {node: module for node, module in graph.calls() if has_weight_slot(module)}
    last = {
        str(node.target): module
        for node, module in layers.items()
        if getattr(module, "output_quantizer", None) is not None and not graph.reachable(node) & layers.keys()
    }
    ranges = {name: _Range(-1 if isinstance(module, nn.Linear) else 1) for name, module in last.items()}
    if last:
        record_activations(model, batches, {f"{name}.output_quantizer": each.add for name, each in ranges.items()})
    found = []
    for name, module in last.items():
        output: Any = module.output_quantizer
        step, seen = output.qparams(torch.empty(0)).scale, ranges[name]
        varied, whole = (seen.high - seen.low) / step, (seen.high.clamp(min=0) - seen.low.clamp(max=0)) / step
        constant, few = (varied > 0) & (varied < 1), (whole > 0) & (whole < FEWEST_LEVELS)  # zero is exact
        if bool((constant | few).any()):
            channel = int((few if bool(few.any()) else constant).int().argmax())
            found.append(DestroyedHead(name, channel, not bool(few[channel])))
    return found


def excluding(config: QuantConfig, heads: list[DestroyedHead]) -> QuantConfig:
    """Return the config that keeps heads in float."""
    names = [config.exclude or "", *(escape(each.layer) for each in heads)]
    return replace(config, exclude=",".join(filter(None, names)))


class _Range:
    """The range of each channel, (C,), of a tensor; ``axis``: of the channels."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low = self.high = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Widen the ranges to the values of ``x``."""
        low, high = torch.aminmax(x.transpose(0, self.axis).flatten(1), dim=1)
        self.low = torch.minimum(self.low, low) if len(self.low) else low
        self.high = torch.maximum(self.high, high) if len(self.high) else high
