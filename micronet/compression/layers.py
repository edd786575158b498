"""The layers of a network as shapes, and their shapes if groups of channels are narrower: a product of two widths."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from micronet.graph import ops
from micronet.models.device import Example, as_inputs
from micronet.models.modes import eval_mode, layers_called
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.ids import STRIDE, Ids


@dataclass(frozen=True)
class Shape:
    """What the cost of a layer depends on.

    ``sizes``: of its input without the batch and the channels; of a linear layer, all axes before the last.
    """

    kind: Literal["Conv", "ConvTranspose", "Linear"]
    inputs: int
    outputs: int
    sizes: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    results: tuple[int, ...] = ()  # of its output, like ``sizes``

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.inputs * self.outputs // self.groups * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """The multiply-accumulates for one sample."""
        return self.weights * math.prod(self.sizes if self.kind == "ConvTranspose" else self.results)

    @property
    def values(self) -> int:
        """The number of values that it reads and returns for one sample."""
        return self.inputs * math.prod(self.sizes) + self.outputs * math.prod(self.results)


@dataclass(frozen=True)
class Layer:
    """A layer: its shape, how often it runs, and which groups its channels belong to: group -> how many."""

    shape: Shape
    calls: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]

    def narrowed(self, shares: Mapping[int, float]) -> Shape:
        """Return the shape if only a share of each group is left."""
        shape = self.shape
        if not any(group in shares for group in (*self.reads, *self.writes)):
            return shape
        inputs, outputs = (
            round(total - sum((1 - shares.get(group, 1.0)) * count for group, count in groups.items()))
            for total, groups in ((shape.inputs, self.reads), (shape.outputs, self.writes))
        )
        depthwise = shape.groups == shape.inputs > 1
        groups = inputs if depthwise else shape.groups
        return replace(shape, inputs=inputs, outputs=outputs, groups=groups)


def find_layers(model: nn.Module, example: Example, channels: ChannelMap | None) -> dict[str, Layer]:
    """Return the convolutions and linear layers that run, by name.

    Args:
        model: The network.
        example: An input for it.
        channels: Its groups of channels; None if they are not known.
    """
    shapes, calls = dict[str, Shape](), dict[str, int]()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (*ops.CONVOLUTIONS, nn.Linear)):
            hooks.append(module.register_forward_hook(_recorder(name, shapes, calls)))
    try:
        with eval_mode(model), layers_called(), torch.no_grad():
            model(*as_inputs(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Layer(shape, calls[name], *_ends(name, shape, channels)) for name, shape in shapes.items()}


def _recorder(name: str, shapes: dict[str, Shape], calls: dict[str, int]) -> Callable[..., None]:
    """Return a hook that notes a layer's shape."""

    def record(module: Any, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            shapes[name] = _shape(module, given[0], output)
            calls[name] = calls.get(name, 0) + 1

    return record


def _shape(module: Any, x: Tensor, y: Tensor) -> Shape:
    if isinstance(module, nn.Linear):
        sizes = tuple(x.shape[1:-1])
        return Shape("Linear", module.in_features, module.out_features, sizes, results=sizes)
    padding = module.padding
    if padding == "same":
        spans = zip(module.dilation, module.kernel_size, strict=True)
        padding = tuple(dilation * (kernel - 1) // 2 for dilation, kernel in spans)
    elif isinstance(padding, str):
        padding = (0,) * len(module.kernel_size)
    return Shape(
        "ConvTranspose" if module.transposed else "Conv", module.in_channels, module.out_channels, tuple(x.shape[2:]),
        tuple(module.kernel_size), tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups,
        tuple(y.shape[2:]),
    )  # fmt: skip


def _ends(name: str, shape: Shape, channels: ChannelMap | None) -> tuple[dict[int, int], dict[int, int]]:
    """Return how many channels of each group a layer reads and writes."""
    known = channels.layers.get(name) if channels is not None else None
    if known is None or len(known.outputs) != shape.outputs:
        return {}, {}
    reads = {} if known.inputs is None or len(known.inputs) != shape.inputs else _counts(known.inputs)
    return reads, _counts(known.outputs)


def _counts(ids: Ids) -> dict[int, int]:
    groups, counts = np.unique(ids // STRIDE, return_counts=True)
    return {int(group): int(count) for group, count in zip(groups, counts, strict=True) if group >= 0}
