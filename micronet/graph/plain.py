"""Plain layers: every layer of a traced network as a module of torch, however its author wrote it.

A layer is what a node computes. ``F.conv2d`` with a module's own weight is that module's convolution, whether its
forward belongs to ``nn.Conv2d``, to a subclass or to a class of the user's. In the graph, such a call becomes a call of
a module of torch that holds the same tensors, under the same names if they are its usual ones. What else the forward
does stays as it is.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph.attributes import Attribute
from micronet.graph.biases import split_biases
from micronet.graph.computed import Values, store_weight
from micronet.graph.graph_module import GraphModule
from micronet.graph.layer_calls import CALLS, arguments_of
from micronet.graph.leaves import frozen_eps, is_frozen_norm, passes_in_eval
from micronet.models.layers import FrozenBatchNorm, Noise


@dataclass(frozen=True)
class PlainLayer:
    """A module of torch that stands for a layer.

    ``tensors``: its parameter or buffer -> that of the network. ``sizes``: its integers that are the user's attributes.
    """

    module: nn.Module
    tensors: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Attribute] = field(default_factory=dict)


def make_plain(
    graph: fx.Graph, model: nn.Module, *, training: bool, only: Collection[str] | None = None
) -> dict[str, PlainLayer]:
    """Rewrite a graph in place so that every layer is a call of a module of torch.

    Args:
        graph: A network's graph, as traced.
        model: The network.
        training: The mode it was traced in.
        only: The names of the layers to make; None for all.

    Returns:
        The new modules by name. A name is the network's own if the layer's tensors all belong to one module under
        their usual names, and otherwise made from the weight's name.
    """
    layers, calls = find_plain(graph, model, training=training)
    return replace_calls(graph, layers, calls, layers if only is None else only)


def find_plain(
    graph: fx.Graph, model: nn.Module, *, training: bool, weights: Values | None = None, products: bool = False
) -> tuple[dict[str, PlainLayer], dict[fx.Node, str]]:
    """Return the layers that ``make_plain`` would make, by name, and the calls of functions that they would replace.

    ``weights``: where to store computed weights (see ``store_weight``); None leaves their layers as they are. The graph
    changes too: see ``split_biases``. ``products``: whether matrices of products were transposed, and keep their names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    called = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")  # in a fixed order
    stored = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    split_biases(graph, stored)
    replaced = {name: _replacement(name, modules) for name in called}
    layers = {name: other for name, other in replaced.items() if other is not None}
    calls: dict[fx.Node, str] = {}
    made_from: dict[str, Any] = {}
    taken: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in CALLS:
            continue
        if weights is not None:
            store_weight(node, model, stored, weights, taken, transposes=products)
            stored |= weights
        found = _layer(node, stored, modules, called, training)
        if found is None:
            continue
        name, recipe, layer = found
        if made_from.setdefault(name, recipe) != recipe:
            continue  # the same tensors, used in another way
        layers.setdefault(name, layer)
        calls[node] = name
    return layers, calls


def replace_calls(
    graph: fx.Graph, layers: Mapping[str, PlainLayer], calls: Mapping[fx.Node, str], only: Collection[str]
) -> dict[str, PlainLayer]:
    """Replace calls of functions that ``find_plain`` found by calls of layers; return the layers of these names."""
    for node, name in calls.items():
        if name not in only:
            continue
        with graph.inserting_before(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            call = graph.create_node("call_module", name, (source,))  # call_module looks for it in the graph's owner
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    if set(calls.values()) & set(only):
        _remove_unused(graph)
    return {name: layer for name, layer in layers.items() if name in only}


def with_plain(model: nn.Module, plain: Mapping[str, PlainLayer], graph: fx.Graph, *others: fx.Graph) -> fx.GraphModule:
    """Return a network that runs a graph with plain layers and the model's other modules, tensors and modes.

    ``others``: more graphs whose modules it gets too.
    """
    attributes: dict[str, Any] = {}
    for node in (node for each in (graph, *others) for node in each.nodes):
        name = str(node.target)
        if node.op == "call_module":
            attributes[name] = plain[name].module if name in plain else model.get_submodule(name)
        elif node.op == "get_attr":
            attributes[name] = attrgetter(name)(model)
    network = GraphModule(attributes, graph, type(model).__name__)
    for name in attributes.keys() - {str(node.target) for node in graph.nodes}:
        _attach(network, name, attributes[name])
    network.training = model.training
    for layer in plain.values():
        layer.module.training = model.training
    for name, _ in model.named_buffers():
        owner, _, buffer = name.rpartition(".")
        if name in attributes and buffer in model.get_submodule(owner)._non_persistent_buffers_set:
            network.get_submodule(owner)._non_persistent_buffers_set.add(buffer)
    return network


def _attach(network: fx.GraphModule, name: str, value: Any) -> None:
    """Give a network a module or a tensor that its own graph does not use."""
    if isinstance(value, nn.Module):
        network.add_submodule(name, value)
        return
    owner, _, own_name = name.rpartition(".")
    if owner and owner not in dict(network.named_modules()):
        network.add_submodule(owner, nn.Module())
    _put(network.get_submodule(owner), own_name, value)


def bound(layer: PlainLayer, model: nn.Module) -> nn.Module:
    """Return a plain layer with the tensors of a copy of its network."""
    module = copy.copy(layer.module)
    module._parameters, module._buffers = module._parameters.copy(), module._buffers.copy()
    for name, place in layer.tensors.items():
        _put(module, name, attrgetter(place)(model))
    return module


def _replacement(name: str, modules: Mapping[str, Any]) -> PlainLayer | None:
    """Return what stands for a leaf of the user's: a frozen batch norm or a kind of dropout."""
    module = modules[name]
    if isinstance(module, (FrozenBatchNorm, Noise)):
        return None
    if is_frozen_norm(module):
        if (eps := frozen_eps(module)) is None:
            return None
        norm = FrozenBatchNorm(len(module.weight), eps, device="meta")
        norm._buffers = module._buffers.copy()
        return PlainLayer(norm, {own: f"{name}.{own}" for own in norm._buffers})
    return PlainLayer(Noise(module)) if passes_in_eval(module) else None


def _layer(
    node: fx.Node,
    stored: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    called: Collection[str],
    training: bool,
) -> tuple[str, Any, PlainLayer] | None:
    """Return the layer that a call applies, its name and what it is made from; None if the call computes any of it."""
    call = CALLS[node.target]
    given = arguments_of(node)
    sizes = {name: value for name, value in given.items() if isinstance(value, Attribute)}
    given = tree_map(lambda value: int(value) if isinstance(value, Attribute) else value, given)
    tensors = {name: given.pop(name, None) for name in call.tensors.split()}
    given.pop("input", None)
    uses_batch = given.pop("training", training)
    if uses_batch and not training:
        return None  # batch statistics in eval mode
    places = {name: str(read.target) for name, read in tensors.items() if read is not None and _is_stored(read, stored)}
    if len(places) < sum(read is not None for read in tensors.values()) or not places:
        return None
    if any(isinstance(leaf, fx.Node) for leaf in tree_leaves(given)):
        return None
    first = next(iter(places.values())) if "weight" not in places else places["weight"]
    owner, _, _ = first.rpartition(".")
    own = bool(owner) and all(place == f"{owner}.{name}" for name, place in places.items())
    own = own and not _reads_any(node.graph, {f"{owner}.{name}" for name in tensors if name not in places})
    if own and owner in called:  # that module may compute something else
        if not isinstance(modules[owner], nn.Embedding):
            return None
        own = False  # a language model scores words by their embeddings
    name = owner if own else made_name(first)
    if "momentum" in given and isinstance(modules[owner], nn.modules.batchnorm._BatchNorm):
        given["momentum"] = modules[owner].momentum  # None averages all batches: the call got this one's share
    recipe = (node.target, places, given)
    module: Any = call.make({name: stored.get(places.get(name, "")) for name in tensors}, given)
    if training and not uses_batch:
        module = FrozenBatchNorm(module.num_features, module.eps, device="meta")
    for tensor_name in tensors:
        _put(module, tensor_name, stored.get(places.get(tensor_name, "")))
    if own:
        module._modules = modules[owner]._modules.copy()
        counter = modules[owner]._buffers.get("num_batches_tracked")
        if counter is not None and "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = counter
            places["num_batches_tracked"] = f"{owner}.num_batches_tracked"
    return name, recipe, PlainLayer(module, places, sizes)


def made_name(tensor: str) -> str:
    """Return the name of a layer made for a call; ``tensor``: the first that the call reads, as a weight."""
    return f"{tensor.replace('.', '_')}_layer"


def _reads_any(graph: fx.Graph, places: Collection[str]) -> bool:
    """Return True if a graph reads tensors that a layer of the owner's name would use, as a bias it adds elsewhere."""
    return bool(places) and any(node.op == "get_attr" and node.target in places for node in graph.nodes)


def _is_stored(node: Any, stored: Mapping[str, Tensor]) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target) in stored


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Make a tensor of the network a module's parameter or buffer, whichever it is there."""
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    if isinstance(tensor, nn.Parameter) or (tensor is None and name in ("weight", "bias")):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def _remove_unused(graph: fx.Graph) -> None:
    """Remove reads of tensors that only a replaced call used, and updates of a norm's counter of batches."""
    for node in reversed(graph.nodes):
        counts = node.op == "call_method" and str(node.all_input_nodes[0].target).endswith("num_batches_tracked")
        if not node.users and (node.op == "get_attr" or counts):
            graph.erase_node(node)
