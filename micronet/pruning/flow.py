"""Channel numbers flowing through a network: which channel sits at which position of every layer.

Each convolution or linear layer numbers its output channels anew; every other operation does to the numbers what it
does to the channels themselves, so a shuffle permutes them and a concatenation strings them together. Layers whose
channels are added to one another share their numbers. Run again with smaller widths, the same flow tells where
each channel of the pruned network sits, whatever lies between. What is not understood pins its channels.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from micronet.graph import Graph
from micronet.models.layers import ChannelShuffle, Tap
from micronet.pruning.numbering import Ids, Numbering

_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, Tap,
)  # fmt: skip
_POOLS = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_POINTWISE_CALLS: set[object] = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.softplus, F.dropout, F.dropout2d, torch.relu, torch.sigmoid, torch.tanh, torch.clamp,
}  # fmt: skip
_POOL_CALLS: set[object] = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d, F.interpolate,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous"}
_ADDS: set[object] = {operator.add, operator.iadd, torch.add}


Layout = Literal["map", "features", "matrix", "sizes", "other"]


class Channels(NamedTuple):
    """The channels of one tensor.

    ``ids``: (C,) number of the channel at each position, or None where they are not ours to cut.
    ``layout``: a map (N, C, H, W); features (N, C * positions) that a map was flattened to; a matrix (N, C); the
    sizes of a tensor; or anything else.
    """

    ids: Ids | None
    layout: Layout


class Pieces(NamedTuple):
    """Channels that an operation takes in ``number`` equal pieces; ``fixed``: a channel must stay in its piece."""

    ids: Ids
    number: int
    fixed: bool


@dataclass
class Layer:
    """A layer's channels: numbers at its input, None where they are not ours to cut, and at its output."""

    inputs: Ids | None
    outputs: Ids


class Flow:
    """The numbers at every layer of a traced network.

    ``layers``: convolutions and linear layers by name. ``norms``: modules with one value a channel.
    ``pieces``: what must stay equal. ``widths``: channels of each group. ``pinned``: group -> why it is never cut.
    ``names``: the layers that produce each group.
    """

    def __init__(self, graph: Graph, widths: Mapping[int, int] | None = None, like: "Flow | None" = None) -> None:
        """Number the channels of a network. The other arguments are ``with_widths``'s."""
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, Ids] = {}
        self.pieces: list[Pieces] = []
        self._graph = graph
        self._numbering: Numbering = Numbering(widths, None if like is None else like._numbering)
        self._repeats: dict[str, int] = {} if like is None else like._repeats
        self._values: dict[fx.Node, Channels] = {}
        self._opaque: dict[str, str] = {}  # modules that are used in some way that cannot be followed, and why
        for node in graph.fx.nodes:
            self._values[node] = self._visit(node)
        self._settle()

    def with_widths(self, widths: Mapping[int, int]) -> "Flow":
        """Return the flow of the same network with other widths of its groups."""
        return Flow(self._graph, widths, self)

    def _visit(self, node: fx.Node) -> Channels:
        if node.op == "placeholder":
            return Channels(None, "map")
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            self._opaque[owner] = f"its {attribute} is read by the forward itself"
            return Channels(None, "other")
        if node.op == "call_module":
            return self._visit_module(node, str(node.target), self._graph.module(node))
        if node.op == "output":
            for source in self._graph.inputs(node):
                self._numbering.pin(self._values[source].ids, "its channels are the network's output")
            return Channels(None, "other")
        return self._visit_call(node)

    def _visit_module(self, node: fx.Node, name: str, module: Any) -> Channels:
        x = self._first(node)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return self._convolve(name, module, x)
        if isinstance(module, nn.Linear) and x.layout in ("features", "matrix"):
            return self._multiply(name, module, x)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.PReLU)):
            return self._normalise(name, module, x)
        if isinstance(module, _POINTWISE_MODULES) and len(self._graph.inputs(node)) == 1:
            return x
        if isinstance(module, _POOLS) and x.layout == "map":
            return x
        if isinstance(module, ChannelShuffle) and x.layout == "map":
            return self._shuffle(x, module.groups)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(x)
        if self._graph.joins(node):
            return self._join_by_adding(node)
        self._opaque[name] = "it reads what cannot be followed"
        return self._give_up(node, f"{name} ({type(module).__name__}) is not understood by pruning")

    def _visit_call(self, node: fx.Node) -> Channels:
        x = self._first(node)
        method = str(node.target) if node.op == "call_method" else ""
        if node.target in _ADDS or method in ("add", "add_"):
            return self._join_by_adding(node) if len(self._graph.inputs(node)) > 1 else x
        if node.target in (torch.cat, torch.concat) and _argument(node, 1, "dim", 0) == 1:
            return self._join_by_stringing(node)
        if (node.target in _POINTWISE_CALLS or method in _POINTWISE_METHODS) and len(self._graph.inputs(node)) == 1:
            return x
        if node.target in _POOL_CALLS and x.layout == "map":
            return x
        if (node.target is torch.flatten or method == "flatten") and tuple(node.args[1:]) == (1,) and not node.kwargs:
            return self._flatten(x)
        if method in ("view", "reshape") and self._keeps_batch(node):
            return self._flatten(x)
        if method in ("view", "reshape") and len(node.args) == 3:
            return self._give_up(node, "its forward writes sizes down", "matrix")
        if method == "size" and _argument(node, 1, "dim", None) in (0, 2, 3):
            return Channels(None, "other")
        if node.target is getattr and node.args[1] == "shape":
            return Channels(x.ids, "sizes")
        if node.target is operator.getitem and x.layout == "sizes" and node.args[1] in (0, 2, 3):
            return Channels(None, "other")
        what = method or getattr(node.target, "__name__", str(node.target))
        return self._give_up(node, f"{what} in its forward is not understood by pruning")

    def _first(self, node: fx.Node) -> Channels:
        sources = self._graph.inputs(node)
        return self._values[sources[0]] if sources else Channels(None, "other")

    def _convolve(self, name: str, conv: Any, x: Channels) -> Channels:
        if x.layout != "map":
            self._numbering.pin(x.ids, f"{name} reads it in another shape")
            x = Channels(None, "map")
        plain = self._owned(name, conv, x)
        depthwise = conv.groups == conv.in_channels > 1
        if depthwise and x.ids is not None:
            out: Ids = np.repeat(x.ids, conv.out_channels // conv.in_channels)
        else:
            out = self._numbering.new(name, conv.out_channels)
            if conv.groups > 1:
                self._split(out, conv.groups)
                self._split(x.ids, conv.groups)
        if not plain:
            self._numbering.pin(out, f"{name} shares its weight")
        self._note(name, x.ids, out)
        return Channels(out, "map")

    def _multiply(self, name: str, linear: nn.Linear, x: Channels) -> Channels:
        plain = self._owned(name, linear, x)
        out = self._numbering.new(name, linear.out_features)
        if not plain:
            self._numbering.pin(out, f"{name} shares its weight")
        self._note(name, self._spread(name, x, linear.in_features), out)
        return Channels(out, "matrix")

    def _normalise(self, name: str, norm: Any, x: Channels) -> Channels:
        if not self._owned(name, norm, x) or x.ids is None:
            self._opaque[name] = "it reads what cannot be followed"
            return x
        size = norm.num_parameters if isinstance(norm, nn.PReLU) else norm.num_features
        if size == 1 and isinstance(norm, nn.PReLU):
            return x
        ids = self._spread(name, x, size)
        if ids is None:
            return x
        if name in self.norms:
            self._numbering.unify(self.norms[name], ids)
        self.norms[name] = ids
        return Channels(ids, "matrix" if x.layout == "features" else x.layout)

    def _shuffle(self, x: Channels, groups: int) -> Channels:
        if x.ids is None:
            return x
        self.pieces.append(Pieces(x.ids, groups, fixed=False))
        return Channels(x.ids.reshape(groups, -1).T.ravel(), x.layout)

    def _flatten(self, x: Channels) -> Channels:
        return Channels(x.ids, "features") if x.layout == "map" else x

    def _join_by_adding(self, node: fx.Node) -> Channels:
        values = [self._values[source] for source in self._graph.inputs(node)]
        if len({value.layout for value in values}) > 1 or any(value.ids is None for value in values):
            return self._give_up(node, "it is added to channels that cannot be cut", values[0].layout)
        for other in values[1:]:
            self._numbering.unify(values[0].ids, other.ids)
        return max(values, key=lambda value: len(value.ids))  # type: ignore[arg-type]  # one may be broadcast

    def _join_by_stringing(self, node: fx.Node) -> Channels:
        tensors: Any = _argument(node, 0, "tensors", ())
        values = [self._values[t] for t in tensors] if isinstance(tensors, (list, tuple)) else []  # perhaps one twice
        known = [value.ids for value in values if value.ids is not None]
        if known and len(known) == len(values) and {value.layout for value in values} in ({"map"}, {"matrix"}):
            return Channels(np.concatenate(known), values[0].layout)
        return self._give_up(node, "it is concatenated with channels that cannot be cut")

    def _keeps_batch(self, node: fx.Node) -> bool:
        """Tell whether a reshape is to (batch, all the rest); sizes written down as numbers are no batch's."""
        if len(node.args) != 3 or node.args[2] != -1:
            return False
        size = node.args[1]
        if not isinstance(size, fx.Node):
            return False
        if size.target is operator.getitem:
            return bool(size.args[1] == 0)
        return size.target == "size" and _argument(size, 1, "dim", None) == 0

    def _give_up(self, node: fx.Node, why: str, layout: Layout = "other") -> Channels:
        for source in self._graph.inputs(node):
            self._numbering.pin(self._values[source].ids, why)
        return Channels(None, layout)

    def _owned(self, name: str, module: nn.Module, x: Channels) -> bool:
        """Tell whether a layer's parameters are its own; pin its input where they are not."""
        owned = self._graph.owns_parameters(module)
        if not owned:
            self._numbering.pin(x.ids, f"{name} shares its weight")
        return owned

    def _spread(self, name: str, x: Channels, features: int) -> Ids | None:
        """Repeat each channel's number for the positions that flattening has made features of."""
        if x.ids is None or x.layout != "features":
            return x.ids
        repeat = self._repeats.setdefault(name, features // len(x.ids))
        return np.repeat(x.ids, repeat)

    def _split(self, ids: Ids | None, count: int) -> None:
        if ids is not None:
            self.pieces.append(Pieces(ids, count, fixed=True))

    def _note(self, name: str, inputs: Ids | None, outputs: Ids) -> None:
        if name in self.layers:  # called again: both inputs must be cut alike
            self._numbering.unify(self.layers[name].inputs, inputs)
            self._numbering.unify(self.layers[name].outputs, outputs)
        else:
            self.layers[name] = Layer(inputs, outputs)

    def _settle(self) -> None:
        """Name every channel by its group's root."""
        numbering = self._numbering
        for name, why in self._opaque.items():
            channels = [self.norms.get(name)]
            if name in self.layers:
                channels += [self.layers[name].inputs, self.layers[name].outputs]
            for ids in channels:
                numbering.pin(ids, f"{name}: {why}")
        for layer in self.layers.values():
            layer.inputs = None if layer.inputs is None else numbering.canonical(layer.inputs)
            layer.outputs = numbering.canonical(layer.outputs)
        self.norms = {name: numbering.canonical(ids) for name, ids in self.norms.items()}
        self.pieces = [piece._replace(ids=numbering.canonical(piece.ids)) for piece in self.pieces]
        self.names = numbering.names()
        self.widths = {group: numbering.widths[group] for group in self.names}
        self.pinned = {numbering.root(group): why for group, why in reversed(numbering.pinned.items())}


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
