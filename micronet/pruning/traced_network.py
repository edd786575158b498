"""A network as pruning sees it: its traced forwards, and the shapes that their nodes produce for an example input."""

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from micronet.errors import MicronetError, first_line
from micronet.graph.trace import fx_graph
from micronet.models.device import Example, as_inputs
from micronet.models.modes import eval_mode
from micronet.pruning.ids import without_ids


@dataclass(frozen=True)
class TracedNetwork:
    """A network with its traced forwards.

    Attributes:
        model: The network.
        graphs: Its graph in eval mode, and its graph in training mode if that differs.
        results: (graph's index, node's name) -> its result for the example, with each tensor filled with ``FIXED``.
        blocks: Grouped convolutions that lose whole groups, not some channels of each group -> channels per group.
    """

    model: nn.Module
    graphs: Sequence[fx.Graph]
    results: Mapping[tuple[int, str], Any]
    blocks: Mapping[str, int]


def trace_network(model: nn.Module, example: Example, regular: int = 1) -> TracedNetwork:
    """Trace a network and run it on an example in eval mode; ``regular``: what widths should be multiples of.

    Raises MicronetError if torch.fx cannot trace the network (naming the line), or the example does not fit.
    """
    graphs = [_trace(model, training=training) for training in (False, True)]
    in_eval, in_training = ([(node.op, node.name, node.target) for node in graph.nodes] for graph in graphs)
    if in_eval == in_training:
        graphs.pop()
    results: dict[tuple[int, str], Any] = {}
    try:
        with eval_mode(model), torch.no_grad():
            for index, graph in enumerate(graphs):
                _Recorder(model, graph, index, results).run(*as_inputs(model, example))
    except MicronetError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise MicronetError(
            f"the network cannot run on the example input: {first_line(error)}; give an input of the right shape"
        ) from error
    blocks = {
        name: conv.in_channels // conv.groups
        for name, conv in model.named_modules()
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and 1 < conv.groups < conv.in_channels == conv.out_channels
        and math.lcm(regular, conv.in_channels // conv.groups) < math.lcm(regular, conv.groups)  # a finer step
    }
    return TracedNetwork(model, graphs, results, blocks)


class _Recorder(fx.Interpreter):
    """Runs a forward and records the result of each node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, index: int, results: dict[tuple[int, str], Any]) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._index, self._results = index, results

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._results[self._index, n.name] = tree_map(without_ids, result)
        return result


def _trace(model: nn.Module, *, training: bool) -> fx.Graph:
    try:
        return fx_graph(model, training=training)
    except Exception as error:  # a user's forward may raise anything when it runs on proxies
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        line = f" ({own[-1].line})" if own and own[-1].line else ""  # code recorded in an artifact has no source file
        where = f" at {own[-1].filename}:{own[-1].lineno}{line}" if own else ""
        raise MicronetError(
            f"torch.fx cannot trace the network{where}: {first_line(error)}; remove branches on tensor values from "
            "forward(), or move them into a module with is_leaf = True, which pruning leaves alone"
        ) from error
