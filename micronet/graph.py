"""A network as a graph of tensors: who produces each, who reads it, and where a named place must be added.

Tracing is torch.fx's, symbolic: it needs no data. A module is one node (a leaf) where it is one of torch's own or
says ``is_leaf``; containers are looked into.
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from micronet.models.layers import Tap

# Modules and calls that only move values: what was on a grid stays on it.
_MOVING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
_MOVING_MODULE_NAMES = ("ChannelShuffle", "StochasticDepth", "Permute")
_MOVING_CALLS: set[object] = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.max_pool2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, F.dropout,
}  # fmt: skip
_MOVING_METHODS = {
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
}  # fmt: skip
_JOINING_CALLS: set[object] = {operator.add, operator.iadd, torch.add, torch.cat, torch.concat, torch.concatenate}
_JOINING_METHODS = {"add", "add_"}
_NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_NON_NEGATIVE_CALLS: set[object] = {
    F.relu,
    F.relu6,
    torch.relu,
    torch.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
    torch.softmax,
}
_NON_NEGATIVE_METHODS = {"relu", "relu_", "sigmoid", "softmax"}
_AVERAGING_MODULES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_AVERAGING_CALLS: set[object] = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool2d, torch.mean}
_AVERAGING_METHODS = {"mean"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "is_leaf", False) or super().is_leaf_module(m, module_qualified_name)


class Graph:
    """The traced graph of a network, with questions about its nodes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fx = _Tracer().trace(model)
        self._modules = dict(model.named_modules())

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Yield every node that calls a module, with that module, in the order they run."""
        for node in self.fx.nodes:
            if node.op == "call_module":
                yield node, self._modules[str(node.target)]

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module a node calls, or None where it calls a function or a method."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def call_count(self, module: nn.Module) -> int:
        """Return how many nodes call ``module``."""
        return sum(1 for _, called in self.calls() if called is module)

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node whose values ``node``'s tensor holds: back through flattening, max-pooling and the like."""
        while self.moves_only(node) and not hasattr(self.module(node), "output_quantizer"):
            node = _tensor_inputs(node)[0]
        return node

    def moves_only(self, node: fx.Node) -> bool:
        """Tell whether a node's output holds no value that its input does not (padding of a max-pool aside)."""
        if node.op == "call_module":
            module = self.module(node)
            return isinstance(module, _MOVING_MODULES) or type(module).__name__ in _MOVING_MODULE_NAMES
        if node.target is operator.getitem:  # a piece of a split tensor; of anything else it may be a new tensor
            return self.moves_only(_tensor_inputs(node)[0])
        return _is_call(node, _MOVING_CALLS, _MOVING_METHODS) and bool(_tensor_inputs(node))

    def joins(self, node: fx.Node) -> bool:
        """Tell whether a node adds or concatenates several tensors."""
        if node.op == "call_module":
            return type(self.module(node)).__name__ in ("Add", "Concat")
        return _is_call(node, _JOINING_CALLS, _JOINING_METHODS) and len(_tensor_inputs(node)) > 1

    def averages(self, node: fx.Node) -> bool:
        """Tell whether a node is an average pool."""
        if node.op == "call_module":
            return isinstance(self.module(node), _AVERAGING_MODULES)
        return _is_call(node, _AVERAGING_CALLS, _AVERAGING_METHODS)

    def non_negative(self, node: fx.Node) -> bool:
        """Tell whether a node's output is never below zero: a ReLU, a sigmoid, or an average or a move of such."""
        if self.moves_only(node) or self.averages(node):
            return self.non_negative(_tensor_inputs(node)[0])
        if node.op == "call_module":
            return isinstance(self.module(node), _NON_NEGATIVE_MODULES)
        return _is_call(node, _NON_NEGATIVE_CALLS, _NON_NEGATIVE_METHODS)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose outputs a node reads, those inside lists included."""
        return _tensor_inputs(node)

    def reachable(self, node: fx.Node) -> set[fx.Node]:
        """Return every node that a node's output can influence."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for user in waiting.pop().users:
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return seen

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """Return (convolution or linear, batch norm) names where the norm is the only reader of the layer's output."""
        pairs = []
        for node, norm in self.calls():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or self.call_count(norm) != 1:
                continue
            layer_node = _tensor_inputs(node)[0]
            layer = self.module(layer_node)
            if (
                isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
                and norm.track_running_stats
                and len(layer_node.users) == 1
                and self.call_count(layer) == 1
                and getattr(layer, "output_quantizer", None) is None
            ):
                pairs.append((str(layer_node.target), str(node.target)))
        return pairs


def trace(model: nn.Module) -> Graph | None:
    """Trace a network; None where its forward depends on data or does what torch.fx cannot follow."""
    try:
        return Graph(model)
    except Exception:  # a user's forward may raise anything when run on proxies
        return None


def add_taps(model: nn.Module, places: list[str]) -> nn.Module:
    """Return the network with a ``Tap`` behind each of the named nodes of its graph; its state-dict keys stay.

    A tap is where a quantizer of a tensor sits that no module of its own produces: a functional add or relu, or a
    module that is called more than once. Functional dropout becomes a module, since tracing would freeze its mode.
    """
    graph = Graph(model)
    nodes = {node.name: node for node in graph.fx.nodes}
    outlined = fx.GraphModule(model, graph.fx)
    for place in places:
        node = nodes[place]
        outlined.add_submodule(tap_name(place), Tap())
        with graph.fx.inserting_after(node):
            tap = graph.fx.call_module(tap_name(place), (node,))
        node.replace_all_uses_with(tap, delete_user_cb=lambda user, tap=tap: user is not tap)
    _outline_dropout(outlined)
    outlined.recompile()
    return outlined


def tap_name(place: str) -> str:
    """Return the name of the tap behind the node called ``place``."""
    return f"{place}_tap"


def _outline_dropout(model: fx.GraphModule) -> None:
    for node in list(model.graph.nodes):
        if node.op == "call_function" and node.target is F.dropout:
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            model.add_submodule(f"{node.name}_module", nn.Dropout(rate))
            with model.graph.inserting_after(node):
                dropout = model.graph.call_module(f"{node.name}_module", (_tensor_inputs(node)[0],))
            node.replace_all_uses_with(dropout)
            model.graph.erase_node(node)


def _is_call(node: fx.Node, functions: set[object], methods: set[str]) -> bool:
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)
