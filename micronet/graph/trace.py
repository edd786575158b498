"""A network as a graph of tensors: who produces each, who reads it, and where a named place must be added.

Tracing is torch.fx's, symbolic: it needs no data. A module is one node (a leaf) where it is one of torch's own or
says ``is_leaf``; containers are looked into.
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from micronet.models.layers import Add, ChannelShuffle, Tap

# Modules and calls that only move values: what was on a grid stays on it.
_MOVING_MODULES = (
    ChannelShuffle,
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
_MOVING_CALLS: set[object] = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.max_pool2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, F.dropout,
}  # fmt: skip
_MOVING_METHODS = {
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
}  # fmt: skip
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_MAX_POOL_CALLS: set[object] = {torch.max_pool2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d}
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


_ELEMENTWISE_ON_FEATURES = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Identity, Tap)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "is_leaf", False) or super().is_leaf_module(m, module_qualified_name)


class Graph:
    """The traced graph of a network in evaluation, with questions about its nodes.

    ``mode_keys``: the function calls that are told the mode, and where in their arguments; None where more than that
    differs in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fx = traced(model, training=False)
        self.mode_keys = _mode_keys(traced(model, training=True), self.fx)
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
        while self.moves_only(node):
            node = self.inputs(node)[0]
        return node

    def moves_only(self, node: fx.Node) -> bool:
        """Tell whether a node's output holds no value that its input does not (padding of a max-pool aside)."""
        if node.op == "call_module":
            return isinstance(self.module(node), _MOVING_MODULES)
        if node.target is operator.getitem:  # a piece of a split tensor; of anything else it may be a new tensor
            return self.moves_only(self.inputs(node)[0])
        return _is_call(node, _MOVING_CALLS, _MOVING_METHODS) and bool(self.inputs(node))

    def is_relu(self, node: fx.Node) -> bool:
        """Tell whether a node is a ReLU or a ReLU6, as a module or a call."""
        if node.op == "call_module":
            return isinstance(self.module(node), (nn.ReLU, nn.ReLU6))
        return _is_call(node, {F.relu, F.relu6, torch.relu}, {"relu", "relu_"})

    def pools(self, node: fx.Node) -> bool:
        """Tell whether a node is a max-pool: what it gives out it has chosen among its input's values."""
        if node.op == "call_module":
            return isinstance(self.module(node), _MAX_POOLS)
        return _is_call(node, _MAX_POOL_CALLS, set())

    def joins(self, node: fx.Node) -> bool:
        """Tell whether a node adds or concatenates several tensors."""
        if node.op == "call_module":
            return isinstance(self.module(node), Add)
        return _is_call(node, _JOINING_CALLS, _JOINING_METHODS) and len(self.inputs(node)) > 1

    def averages(self, node: fx.Node) -> bool:
        """Tell whether a node is an average pool."""
        if node.op == "call_module":
            return isinstance(self.module(node), _AVERAGING_MODULES)
        return _is_call(node, _AVERAGING_CALLS, _AVERAGING_METHODS)

    def averages_space(self, node: fx.Node) -> bool:
        """Tell whether a node averages over the last axes, as a pool does, and never over a named one."""
        return self.averages(node) and node.target is not torch.mean and node.op != "call_method"

    def non_negative(self, node: fx.Node) -> bool:
        """Tell whether a node's output is never below zero: a ReLU, a sigmoid, or an average or a move of such."""
        if self.moves_only(node) or self.averages(node):
            return self.non_negative(self.inputs(node)[0])
        if node.op == "call_module":
            return isinstance(self.module(node), _NON_NEGATIVE_MODULES)
        return _is_call(node, _NON_NEGATIVE_CALLS, _NON_NEGATIVE_METHODS)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose outputs a node reads, those inside lists included."""
        return list(node.all_input_nodes)

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

    def owns_parameters(self, layer: nn.Module) -> bool:
        """Tell whether a layer's weight is a plain parameter that no other module uses."""
        if hasattr(layer, "parametrizations") or "weight" not in layer._parameters:  # a hook makes it anew, perhaps
            return False
        own = set(map(id, layer.parameters(recurse=False)))
        others = (p for m in self.model.modules() if m is not layer for p in m.parameters(recurse=False))
        return not any(id(parameter) in own for parameter in others)

    def _is_matrix(self, node: fx.Node) -> bool:
        """Tell whether a tensor is known to be (N, features), where a batch norm's channels are a linear's outputs."""
        while node.op == "call_module" and isinstance(self.module(node), _ELEMENTWISE_ON_FEATURES):
            node = self.inputs(node)[0]
        flattened = node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten")
        if flattened:
            return tuple(node.args[1:]) == (1,) and not node.kwargs
        if node.op == "call_method" and node.target in ("view", "reshape"):
            return len(node.args) == 3
        module = self.module(node)
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """Return (convolution or linear, batch norm) names where the norm is the only reader of the layer's output."""
        pairs = []
        for node, norm in self.calls():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or self.call_count(norm) != 1:
                continue
            layer_node = self.inputs(node)[0]
            layer = self.module(layer_node)
            if (
                isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
                and norm.track_running_stats
                and len(layer_node.users) == 1
                and self.call_count(layer) == 1
                and self.owns_parameters(layer)
                and (not isinstance(layer, nn.Linear) or self._is_matrix(layer_node))
                and getattr(layer, "output_quantizer", None) is None
            ):
                pairs.append((str(layer_node.target), str(node.target)))
        return pairs


def trace(model: nn.Module) -> Graph | None:
    """Trace a network; None where its forward depends on data, or on its mode in more than a function's argument."""
    try:
        graph = Graph(model)
    except Exception:  # a user's forward may raise anything when run on proxies
        return None
    return graph if graph.mode_keys is not None else None


def _mode_keys(training: fx.Graph, evaluating: fx.Graph) -> dict[str, str | int] | None:
    """Return, for each function call that is told the mode, where in its arguments; None where more depends on it."""
    if len(training.nodes) != len(evaluating.nodes):
        return None
    keys: dict[str, str | int] = {}
    for train, evaluation in zip(training.nodes, evaluating.nodes, strict=True):
        if (train.op, train.target, len(train.args)) != (evaluation.op, evaluation.target, len(evaluation.args)):
            return None
        places: list[str | int] = [i for i, arg in enumerate(train.args) if str(arg) != str(evaluation.args[i])]
        places += [key for key, arg in train.kwargs.items() if str(arg) != str(evaluation.kwargs.get(key))]
        if not places:
            continue
        values = [
            node.args[p] if isinstance(p, int) else node.kwargs[p] for node in (train, evaluation) for p in places
        ]
        if train.op != "call_function" or values != [True, False]:
            return None
        keys[evaluation.name] = places[0]
    return keys


def traced(model: nn.Module, *, training: bool) -> fx.Graph:
    """Trace a network in a mode; every module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        return _Tracer().trace(model.train(training))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_call(node: fx.Node, functions: set[object], methods: set[str]) -> bool:
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods
