"""A network traced into a graph of tensors, with questions about its nodes.

torch.fx traces symbolically: no data is needed. One node stands for a tensor. A module is a single node (a leaf) if it
comes from torch.nn or sets ``is_leaf``; other modules are traced through.
"""

import operator
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.agreement import computes_same, follows_sizes
from micronet.graph.attributes import has_sizes
from micronet.graph.biases import BIAS
from micronet.graph.computed import Values
from micronet.graph.graph_module import GraphModule
from micronet.graph.head_sizes import fix_head_sizes
from micronet.graph.plain import PlainLayer, find_plain, make_plain, replace_calls, with_plain
from micronet.graph.products import make_layers
from micronet.graph.record import UnbuiltError, describe_example, holds, record_network, trains_more
from micronet.graph.size import scaled_size
from micronet.graph.sources import computed_only_from
from micronet.graph.symbolic import hides_work, keeps_state, mode_keys, symbolic
from micronet.graph.training import outline_mode_calls
from micronet.graph.two_modes import pair_nodes
from micronet.models.computed import weight_owners
from micronet.models.device import Example, as_inputs
from micronet.models.inputs import make_inputs
from micronet.models.layers import Add, EvalOnly, ModeValue


class Graph:
    """The graph of a network in eval mode.

    Attributes:
        model: The network with plain layers: the given one, or one that shares its tensors (see ``graph.plain``).
        plain: The layers that are not the given network's own modules, by name.
        recorded: The inputs on which the network was recorded, as ``describe_example`` returns them; None if it was
            traced symbolically.
        fx: Its torch.fx graph.
        training: Its graph in training mode.
        products: Whether some layers were written as products.
        sizes: Whether ``model`` is to read sizes of its reshapes and splits.
        mode_keys: Function calls that depend on the mode -> position or name of their mode argument. None if the
            graph in training mode differs in anything else.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: list[dict[str, Any]] | None = None,
        *,
        plain: bool = True,
        weights: Values | None = None,
        products: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Trace a network; raises whatever its forward raises.

        ``plain``: whether to make its layers plain. ``weights``: where to store weights that it computes, by name.
        ``products``: whether products with stored matrices are linear layers. ``sizes``: not None if the network is to
        read its reshapes' sizes, if both modes have one graph (``graph.attributes``); what ``find_head_sizes`` found.
        """
        self.recorded = recorded
        self.fx, training = (symbolic(model, training=mode) for mode in (False, True))
        self.training = training
        if keeps_state(self.fx) or keeps_state(training):
            raise MicronetError("forward() writes into a tensor of its own")
        if sizes:
            for graph in (self.fx, training):
                fix_head_sizes(model, graph, sizes)
        self.sizes = sizes is not None and has_sizes(self.fx, model)
        self.products = sum(products and make_layers(graph, model) for graph in (self.fx, training)) > 0  # in both
        layers, calls = find_plain(self.fx, model, training=False, weights=weights, products=products)
        others, more = find_plain(training, model, training=True, weights=weights, products=products)
        both = layers.keys() & others.keys() if plain else set()  # one of the modes may compute a layer in another way
        self.plain = replace_calls(self.fx, layers, calls, both) | replace_calls(training, others, more, both)
        self.mode_keys = mode_keys(training, self.fx)
        self.model = model
        self.sizes &= self.mode_keys is not None
        if self.plain or self.sizes:
            network = self.model = with_plain(model, self.plain, self.fx)
            outline_mode_calls(network, self.mode_keys or {})
            network.recompile()
        self._modules = dict(self.model.named_modules())

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Yield every node that calls a module, with that module, in execution order."""
        for node in self.fx.nodes:
            if node.op == "call_module":
                yield node, self._modules[str(node.target)]

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None if it calls a function or a method."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def call_count(self, module: nn.Module) -> int:
        """Return the number of nodes that call ``module``."""
        return sum(1 for _, called in self.calls() if called is module)

    def matches(self, node: fx.Node, family: ops.Family) -> bool:
        """Return True if a node applies an operator of a family."""
        return family.matches(node, self.module(node))

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node that computed the values of a tensor: skip flattening, max-pooling and the like."""
        while self.preserves_values(node):
            node = node.all_input_nodes[0]
        return node

    def preserves_values(self, node: fx.Node) -> bool:
        """Return True if every output value of a node is one of its input values, or zero padding."""
        if node.target is operator.getitem:  # part of a tensor if the index is one's; else of a list, or of a new tuple
            return isinstance(node.args[1], tuple) or self.preserves_values(node.all_input_nodes[0])
        passes = self.matches(node, ops.PRESERVES_VALUES) or ops.pads_with_zeros(node, self.module(node))
        return passes and bool(node.all_input_nodes)

    def is_join(self, node: fx.Node) -> bool:
        """Return True if a node adds or concatenates several tensors."""
        several = BIAS not in node.meta and (len(node.all_input_nodes) > 1 or isinstance(self.module(node), Add))
        return several and self.matches(node, ops.JOIN) and not any(map(self.is_number, node.all_input_nodes))

    def is_number(self, node: fx.Node) -> bool:
        """Return True if a node computes a size or another plain value, not a tensor."""
        if node.target is getattr:
            return node.args[1] in ops.METADATA_ATTRIBUTES
        if self.matches(node, ops.METADATA) or isinstance(self.module(node), ModeValue):
            return True
        pure = getattr(node.target, "__module__", "") in ("_operator", "math") or node.target is scaled_size
        arithmetic = node.op == "call_function" and pure
        return arithmetic and bool(node.all_input_nodes) and all(map(self.is_number, node.all_input_nodes))

    @cached_property
    def stored(self) -> set[fx.Node]:
        """The nodes that read stored tensors, or compute something from such nodes alone."""
        return computed_only_from(self.fx, lambda node: node.op == "get_attr")

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that read a tensor's values, not only its sizes."""
        return [user for user in node.users if not self.is_number(user)]

    def readable(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose tensors a node reads; none is a size or a stored parameter."""
        return [read for read in node.all_input_nodes if read.op != "get_attr" and not self.is_number(read)]

    def is_non_negative(self, node: fx.Node) -> bool:
        """Return True if a node's output is never below zero: a ReLU, a sigmoid, or such values moved or averaged."""
        if self.preserves_values(node) or self.matches(node, ops.AVERAGE):
            return self.is_non_negative(node.all_input_nodes[0])
        return self.matches(node, ops.NON_NEGATIVE)

    def reachable(self, node: fx.Node) -> set[fx.Node]:
        """Return all nodes that depend on a node's output."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for user in waiting.pop().users:
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return seen

    def owns_weight(self, layer: nn.Module) -> bool:
        """Return True if a layer's weight is a plain parameter that no other module uses, nor the forward itself."""
        return layer in self._owners

    @cached_property
    def _owners(self) -> set[nn.Module]:
        read = {str(node.target) for node in self.fx.nodes if node.op == "get_attr" and self.readers(node)}
        return {
            layer
            for name, layer in self._modules.items()
            if not any(f"{name}.{own}" in read for own, _ in layer.named_parameters(recurse=False))
        } & weight_owners(self.model)

    def conv_bn_pairs(self, *, repeated: bool = True) -> list[tuple[str, str]]:
        """Return the names of (convolution or linear layer, batch norm) pairs that can be folded.

        The batch norm must be the only consumer of the layer's output; ``repeated``: in every call of several.
        """
        pairs = self._norm_pairs(self.fx, repeated)
        if self.mode_keys is None:
            pairs = [pair for pair in pairs if pair in self._norm_pairs(self.training, repeated)]
        return pairs

    def _norm_pairs(self, graph: fx.Graph, repeated: bool) -> list[tuple[str, str]]:
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(self._modules[str(node.target)], []).append(node)
        pairs = []
        for norm, nodes in calls.items():
            if not isinstance(norm, ops.BATCH_NORMS) or (len(nodes) > 1 and not repeated):
                continue
            layer_nodes = [node.all_input_nodes[0] for node in nodes]
            layer = self.module(layer_nodes[0])
            if (
                isinstance(layer, (*ops.CONVOLUTIONS, nn.Linear))
                and norm.track_running_stats
                and calls[layer] == layer_nodes
                and len({(node.target, before.target) for node, before in zip(nodes, layer_nodes, strict=True)}) == 1
                and all(len(self.readers(node)) == 1 for node in layer_nodes)
                and self.owns_weight(layer)
                and not (layer._forward_hooks or norm._forward_pre_hooks)  # something happens between them
                and (not isinstance(layer, nn.Linear) or all(map(self._is_matrix, layer_nodes)))
                and getattr(layer, "output_quantizer", None) is None
            ):
                pairs.append((str(layer_nodes[0].target), str(nodes[0].target)))
        return pairs

    def _is_matrix(self, node: fx.Node) -> bool:
        """Return True if a tensor is known to be (N, features), so that a batch norm's channels are its features."""
        while node.op == "call_module" and isinstance(self.module(node), ops.KEEPS_MATRIX):
            node = node.all_input_nodes[0]
        if node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten"):
            return tuple(node.args[1:]) == (1,) and not node.kwargs
        if node.op == "call_method" and node.target in ("view", "reshape"):
            return len(node.args) == 3
        module = self.module(node)
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def trace(model: nn.Module, example: Example | None = None) -> Graph | None:
    """Trace a network, symbolically or, if that fails or hides work, by running it on the example input, if given.

    Returns:
        The graph; None if the forward depends on data, the batch's size in Python, or more of the mode than a flag.
    """
    try:
        graph = Graph(model)
    except Exception:  # a user's forward may raise anything when it runs on proxies
        graph = None
    if graph is not None and graph.mode_keys is None:
        graph = None
    if example is None:
        return graph
    inputs = as_inputs(model, example)
    if graph is not None:
        network = graph.model if graph.plain else GraphModule(model, graph.fx)
        if not computes_same(model, network, inputs):
            graph = None
        elif not hides_work(graph.fx, model):
            return graph
    try:
        recorded = record_network(model, inputs)[0]
        if any(isinstance(each, EvalOnly) for each in recorded.modules()) and trains_more(model, inputs):
            return graph  # a record in eval mode would lose layers
        described = describe_example(inputs)
        follows = graph is None or follows_sizes(model, recorded, inputs)  # as a symbolic trace does
        return Graph(recorded, described) if follows and holds(model, recorded, described, inputs) else graph
    except UnbuiltError:
        raise
    except MicronetError:
        return graph


def trace_modes(model: nn.Module) -> Graph | None:
    """Trace a network whose forward does more in training mode, such as that of an auxiliary classifier.

    Returns:
        The graph in eval mode, whose ``mode_keys`` is None, for changes to modules that both modes use alike; None if
        it cannot be traced symbolically.
    """
    try:
        return Graph(model, plain=False)
    except Exception:  # a user's forward may raise anything when it runs on proxies
        return None


def trace_both(model: nn.Module, example: Example | None = None) -> Graph | None:
    """Trace a network whose forward does in training mode all that it does in eval mode, and more.

    Returns:
        The graph in eval mode, for changes that ``rewrite`` makes in both modes; None for any other network.
    """
    graph = trace_modes(model)
    if graph is None or graph.mode_keys is not None or pair_nodes(graph.fx, graph.training) is None:
        return None
    if example is None or computes_same(model, GraphModule(model, graph.fx), as_inputs(model, example)):
        return graph
    return None


def plain_network(model: nn.Module, recorded: list[dict[str, Any]] | None) -> nn.Module:
    """Return what ``Graph.model`` was for an equal network; ``recorded``: as in that graph.

    Raises MicronetError if the network cannot be recorded on such inputs, or whatever tracing its forward raises.
    """
    return Graph(model).model if recorded is None else record_network(model, make_inputs(recorded))[0]


def traced(model: nn.Module, *, training: bool, buffers: bool = False) -> tuple[fx.Graph, dict[str, PlainLayer]]:
    """Trace a network as ``symbolic`` does; return its graph and the plain layers in it that it does not have."""
    graph = symbolic(model, training=training, buffers=buffers)
    return graph, make_plain(graph, model, training=training)
