"""A network as pruning sees it: its traced forwards, and what every node of them gave out for a real input."""

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from micronet.errors import MicronetError, first_line
from micronet.graph.trace import traced
from micronet.models.inputs import Example, as_inputs


class Shape(tuple[int, ...]):
    """The shape of a tensor that a node gave out."""


@dataclass(frozen=True)
class Network:
    """A network, its traced forwards (as in evaluation and as in training), and their nodes' results.

    ``results``: (forward, node's name) -> what a real input led to, with a ``Shape`` in the place of each tensor.
    ``blocks``: grouped convolutions that lose whole groups, rather than some channels of each -> channels of a group.
    """

    model: nn.Module
    graphs: Sequence[fx.Graph]
    results: Mapping[tuple[int, str], Any]
    blocks: Mapping[str, int]


def open_network(model: nn.Module, example: Example, regular: int = 1) -> Network:
    """Trace a network and run it once on an example, in eval mode; ``regular``: what widths should be multiples of.

    Raises MicronetError where torch.fx cannot trace it (naming the line), or it does not take the example.
    """
    graphs = [_trace(model, training=False), _trace(model, training=True)]
    if [(node.op, node.name, node.target) for node in graphs[0].nodes] == [
        (node.op, node.name, node.target) for node in graphs[1].nodes
    ]:
        graphs.pop()
    results: dict[tuple[int, str], Any] = {}
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for index, graph in enumerate(graphs):
            with torch.no_grad():
                _Recorder(model, graph, index, results).run(*as_inputs(model, example))
    except MicronetError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise MicronetError(f"the network does not take the example input: {first_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Network(model, graphs, results, _blocks(model, regular))


def _blocks(model: nn.Module, regular: int) -> dict[str, int]:
    """Return the grouped convolutions that bear finer widths by losing whole groups, and a group's channels."""
    return {
        name: conv.in_channels // conv.groups
        for name, conv in model.named_modules()
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and 1 < conv.groups < conv.in_channels == conv.out_channels
        and math.lcm(regular, conv.in_channels // conv.groups) < math.lcm(regular, conv.groups)
    }


def owners(model: nn.Module) -> set[str]:
    """Return the modules whose weight is a plain parameter that no other module uses."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        name
        for name, module in model.named_modules()
        if not hasattr(module, "parametrizations")
        and ("weight" in module._parameters)
        and all(holders[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }


class _Recorder(fx.Interpreter):
    """Runs a forward and notes what each node gives out."""

    def __init__(self, model: nn.Module, graph: fx.Graph, index: int, results: dict[tuple[int, str], Any]) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._index, self._results = index, results

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._results[self._index, n.name] = tree_map(
            lambda leaf: Shape(leaf.shape) if isinstance(leaf, Tensor) else leaf, result
        )
        return result


def _trace(model: nn.Module, *, training: bool) -> fx.Graph:
    try:
        return traced(model, training=training)
    except Exception as error:  # a user's forward may raise anything when run on proxies
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        line = f" ({own[-1].line})" if own and own[-1].line else ""  # it has no text in code of an artifact's
        where = f" at {own[-1].filename}:{own[-1].lineno}{line}" if own else ""
        raise MicronetError(
            f"the network cannot be traced by torch.fx, so which channels belong together is unknown: "
            f"{first_line(error)}{where}; write the forward without branches on values, or put that part into a "
            "module with is_leaf = True, which is then left whole"
        ) from error
