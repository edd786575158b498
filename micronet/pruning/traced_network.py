"""A network as pruning sees it: its traced forwards, and what their nodes return for an example."""

import math
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from micronet.errors import MicronetError, first_line
from micronet.graph.agreement import computes_same
from micronet.graph.attributes import marked
from micronet.graph.head_sizes import before_heads
from micronet.graph.plain import PlainLayer, with_plain
from micronet.graph.record import record_network
from micronet.graph.symbolic import equal_graphs, hides_work
from micronet.graph.trace import traced
from micronet.models.device import Example, as_inputs
from micronet.models.modes import eval_mode, state_kept
from micronet.pruning.recording import Key, Recording, Run


@dataclass(frozen=True)
class TracedNetwork:
    """A network with its traced forwards.

    Attributes:
        given: The network itself.
        model: The network with plain layers (see ``graph.plain``); the given one if all its layers are plain.
        plain: The plain layers by name.
        graphs: Its graph in eval mode, and its graph in training mode if that differs.
        results: (graph's index, node's name) -> its result for the example, with each tensor filled with ``FIXED``.
        arguments: Those of operations that may be run again, by the same key; see ``Recording``.
        blocks: Grouped convolutions that lose whole groups, not some channels of each group -> channels per group.
        before_heads: (graph's index, node's name) of what lies between attention and the layers before it.
        probed: What running operations again has shown; see ``channelwise``.
    """

    given: nn.Module
    model: nn.Module
    plain: Mapping[str, PlainLayer]
    graphs: Sequence[fx.Graph]
    results: Mapping[Key, Any]
    arguments: Mapping[Key, Any]
    blocks: Mapping[str, int]
    before_heads: Set[Key]
    probed: dict[Any, Any] = field(default_factory=dict)

    def with_regular(self, regular: int) -> "TracedNetwork":
        """Return the network as traced for widths that should be multiples of another number."""
        return replace(self, blocks=_blocks(self.model, regular))


def trace_network(model: nn.Module, example: Example, regular: int = 1, *, attributes: bool = True) -> TracedNetwork:
    """Trace a network and run it on an example in eval mode; ``regular``: what widths should be multiples of.

    ``attributes``: follow sizes that the user's modules hold, so that they can be changed (see ``Attributes``).
    A forward that torch.fx cannot trace is recorded while it runs on the example. Raises MicronetError if that fails
    too, or the example does not fit.
    """
    given = model
    recording = Recording()
    with marked(given) if attributes else nullcontext():
        model, plain, graphs = _traced(given, example, recording)
    try:
        with state_kept(model), eval_mode(model), torch.no_grad():
            for index, graph in enumerate(graphs):
                _run(model, graph, index, recording, as_inputs(model, example))
    except MicronetError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise MicronetError(
            f"the network cannot run on the example input: {first_line(error)}; pass an input of the right shape"
        ) from error
    before = {(index, node.name) for index, graph in enumerate(graphs) for node in before_heads(model, graph)}
    blocks = _blocks(model, regular)
    return TracedNetwork(given, model, plain, graphs, recording.results, recording.arguments, blocks, before)


def _run(model: nn.Module, graph: fx.Graph, index: int, recording: Recording, inputs: tuple[Any, ...]) -> None:
    """Record a graph that has not run yet; if a mask selects nothing, once more with some elements selected."""
    if not recording.has(index):
        Run(model, graph, index, recording)(*inputs)
    if recording.has_empty(index):
        some = Recording()
        with suppress(Exception):  # the forward may not take what it did not select
            Run(model, graph, index, some, select_some=True)(*inputs)
            recording.update(some)


def _blocks(model: nn.Module, regular: int) -> dict[str, int]:
    """Return the grouped convolutions that lose whole groups, with their channels per group."""
    return {
        name: conv.in_channels // conv.groups
        for name, conv in model.named_modules()
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and 1 < conv.groups < conv.in_channels == conv.out_channels
        and math.lcm(regular, conv.in_channels // conv.groups) < math.lcm(regular, conv.groups)  # a finer step
    }


def _traced(
    model: nn.Module, example: Example, recording: Recording
) -> tuple[nn.Module, dict[str, PlainLayer], list[fx.Graph]]:
    """Return the network with plain layers, those layers, and its graphs in eval mode and, if it differs, training.

    ``recording`` receives the results of the graph in eval mode if the network runs to compare it.
    """
    try:
        (graph, plain), (training, more) = (traced(model, training=mode, buffers=True) for mode in (False, True))
        network = with_plain(model, plain, graph)
    except Exception:  # a user's forward may raise anything when it runs on proxies
        network, plain = record_network(model, example)
        return network, plain, [network.graph]
    same = computes_same(model, Run(network, graph, 0, recording), as_inputs(model, example))
    if not same or hides_work(graph, model):
        with suppress(MicronetError) if same else nullcontext():
            recorded, layers = record_network(model, example)
            recording.clear()
            return recorded, layers, [recorded.graph]
    graphs = [graph] if equal_graphs(graph, training, model) else [graph, training]
    plain |= more  # the training graph knows which norms are frozen
    return (with_plain(model, plain, *graphs) if plain else model), plain, graphs
