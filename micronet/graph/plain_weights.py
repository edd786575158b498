"""Computed weights made plain: those of hooks and parametrizations, and those that a forward computes itself."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import fx, nn

from micronet.graph.agreement import computes_same, follows_sizes
from micronet.graph.attributes import has_sizes, marked, read_attributes, read_sizes
from micronet.graph.computed import Values, computed_from, computes_more, may_compute_weights
from micronet.graph.head_sizes import find_head_sizes, reads_sizes
from micronet.graph.products import make_layers
from micronet.graph.record import record_network
from micronet.graph.trace import Graph, trace
from micronet.models.computed import is_computed, make_plain
from micronet.models.device import Example, as_inputs
from micronet.models.inputs import make_inputs
from micronet.models.modes import check_modes, copy_model

Purpose = Literal["running", "pruning", "training"]  # as of ``Stage.plain_weights``, which must not import torch
COMPUTED = "computed"  # in a record's result: the weights that were computed until this stage made them plain
PRODUCTS = "products"  # there too, if products with stored matrices count as linear layers, as they do since then
SIZES = "sizes_read"  # there too, if the network reads the sizes of its reshapes: what ``find_head_sizes`` found
TRANSPOSED = "transposed"  # there too: stored matrices that were only read transposed, and are stored so since then
KEPT = "kept"  # there too: the weights that go on being computed
STORED = "stored"  # there too: what tells that the forward computed some of them, and the inputs it was recorded on
KEYS = COMPUTED, PRODUCTS, SIZES, TRANSPOSED, KEPT, STORED


def with_plain_weights(
    model: nn.Module, example: Example, purpose: Purpose = "running", kept: Collection[str] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network that stores the weights which the given one computes, and what to put in the stage's record.

    The weights are those of eval mode, and so are the outputs. Without such weights, or if the forward that computes
    them cannot be traced, it returns the given network and nothing.

    Args:
        model: The network.
        example: An input.
        purpose: What follows. If a training may follow, the network stays as it is where a weight would be stored apart
            from a tensor that it is computed from and that something else reads too: they would no longer be tied.
            A training goes on computing its weights, except that matrices which are read transposed are stored so.
        kept: The names of weights, as this function records them, that the network goes on computing.

    Raises:
        MicronetError: The network rewrites its weights when its mode changes; see ``check_modes``.
    """
    check_modes(model)
    names: list[str] = []
    if purpose != "training" and any(map(is_computed, model.modules())):
        model = copy_model(model)
        names = make_plain(model, kept)
    graph = trace(model, example) if _may_store_weights(model, purpose) else None
    stored = None if graph is None else _store_weights(graph, model, example, purpose, kept)
    if stored is None:
        return model, {COMPUTED: names, **_record(KEPT, kept)} if names else {}
    network, more, how = stored
    return network, {COMPUTED: [*names, *more], **how, **_record(KEPT, kept)}


def _record(key: str, names: Collection[str]) -> dict[str, list[str]]:
    return {key: list(names)} if names else {}


def _may_store_weights(model: nn.Module, purpose: Purpose) -> bool:
    """Return False if all layers surely use weights as they are stored, and no size is to be read; nothing runs."""
    graph = trace(model)
    if graph is None:
        return purpose == "pruning" or may_compute_weights(model)
    if purpose == "pruning" and (has_sizes(graph.fx, graph.model) or reads_sizes(graph.model, graph.fx)):
        return True
    return make_layers(graph.fx, model) or any(map(computed_from, graph.fx.nodes))


def _store_weights(
    graph: Graph, model: nn.Module, example: Example, purpose: Purpose, kept: Collection[str]
) -> tuple[nn.Module, list[str], dict[str, Any]] | None:
    """Return a network with stored weights, their names, and how it was made; None where the given one has to stay."""
    make_layers(graph.fx, model)
    if purpose == "training" and any(map(computes_more, graph.fx.nodes)):
        return None
    own = dict(model.named_parameters(remove_duplicate=False))
    inputs = as_inputs(model, example)
    # A record may fix the size of images too.
    reads = purpose == "pruning" and (graph.recorded is None or follows_sizes(model, graph.model, inputs))
    sizes = find_head_sizes(graph.model, graph.fx, inputs) if reads else None
    sized = sizes is not None and (bool(sizes) or has_sizes(graph.fx, graph.model))
    if graph.recorded is not None and not sized and not may_compute_weights(model):
        return None
    for products in (True,) if purpose == "training" else (True, False):  # False: where a product suits no layer
        weights = Values(kept)
        plain = _with_stored_weights(model, graph.recorded, weights, products=products, sizes=sizes)
        read = {place for layer in plain.plain.values() for place in layer.tensors.values()}
        taken = [name for name in weights if name in read]
        if not (taken or plain.products or plain.sizes):
            return None
        sources = {id(own[name]) for name in weights.sources if name in own}
        if purpose != "running" and not sources.isdisjoint(map(id, plain.model.parameters())):
            continue  # some would no longer be tied
        if computes_same(model, plain.model, inputs):
            how: dict[str, Any] = {STORED: graph.recorded or [], PRODUCTS: products}
            how |= _record(TRANSPOSED, [name for name in taken if name in weights.transposed])
            computed = [name for name in taken if name not in weights.transposed]
            return plain.model, computed, how | ({SIZES: sizes} if plain.sizes else {})
    return None


def restore_plain_weights(model: nn.Module, result: Mapping[str, Any]) -> nn.Module:
    """Return the network with the structure that ``with_plain_weights`` gave it; the values come from the file."""
    if COMPUTED in result:
        make_plain(model, result.get(KEPT, ()))
    if STORED not in result:
        return model
    products, sizes = result.get(PRODUCTS, False), result.get(SIZES)
    sizes = {} if sizes is True else sizes  # in earlier files
    weights = Values(result.get(KEPT, ()))
    return _with_stored_weights(model, result[STORED] or None, weights, products=products, sizes=sizes).model


def _with_stored_weights(
    model: nn.Module,
    recorded: list[dict[str, Any]] | None,
    weights: Values,
    *,
    products: bool,
    sizes: Mapping[str, int] | None,
) -> Graph:
    traced = model
    if recorded is not None:
        with marked(model):
            traced, _ = record_network(model, make_inputs(recorded))
        read_attributes(traced)
    with marked(traced):
        graph = Graph(traced, weights=weights, products=products, sizes=sizes)
    if isinstance(graph.model, fx.GraphModule):
        read_attributes(graph.model)
        if graph.sizes:
            read_sizes(graph.model)
    return graph
