"""Which sums and concatenations of a network a runtime computes in integers.

Those that integers feed and an integer operator reads. Others, such as the residual sums of a transformer between
linear layers and layer norms, gain nothing by quantizers, and their rounding errors add up from block to block.
"""

from collections.abc import Set

from torch import fx

from micronet.graph import ops
from micronet.graph.trace import Graph

_ACTIVATION = ops.ANY_RELU | ops.SIGMOID | ops.OTHER_ACTIVATIONS


class IntegerJoins:
    """The joins of a network that are computed in integers.

    Attributes:
        nodes: Their nodes.
    """

    def __init__(self, graph: Graph, layers: Set[fx.Node]) -> None:
        """Find them; ``layers``: the calls of the layers that are quantized."""
        self._graph, self._layers = graph, layers
        self._read = {graph.origin(node.all_input_nodes[0]) for node in layers}
        self.nodes = {node for node in graph.fx.nodes if graph.is_join(node) and graph.reachable(node) & layers}
        while dropped := {node for node in self.nodes if not (self._is_fed(node) and self._is_wanted(node))}:
            self.nodes -= dropped

    def is_float_sum(self, source: fx.Node) -> bool:
        """Return True if a join is computed in floats, and more than layers read it."""
        if not self._graph.is_join(source) or source in self.nodes:
            return False
        waiting = [source]
        while waiting:
            for reader in self._graph.readers(waiting.pop()):
                if self._graph.preserves_values(reader):
                    waiting.append(reader)
                elif reader not in self._layers:
                    return True
        return False

    def _is_fed(self, join: fx.Node) -> bool:
        return all(self._is_integer(each) for each in join.all_input_nodes if not self._graph.is_number(each))

    def _is_integer(self, tensor: fx.Node) -> bool:
        """Return True if a runtime has a tensor in integers, as have all layers and sums that it is computed from."""
        waiting, seen = [(self._graph.origin(tensor), False)], set[tuple[fx.Node, bool]]()
        while waiting:
            node, activated = state = waiting.pop()  # activated: an activation follows
            if state in seen:
                continue
            seen.add(state)
            if self._graph.is_join(node):
                if node not in self.nodes:
                    return False
            elif node in self._graph.stored or (node in self._read and node.op != "placeholder"):
                continue
            elif node in self._layers:  # a linear layer alone returns floats
                if not (activated or isinstance(self._graph.module(node), ops.CONVOLUTIONS)):
                    return False
            else:
                active = self._graph.matches(node, _ACTIVATION)
                if not (active or self._passes(node)):
                    return False
                waiting += [(self._graph.origin(each), activated or active) for each in self._graph.readable(node)]
        return True

    def _passes(self, node: fx.Node) -> bool:
        """Return True for the other operators that integers go through."""
        norm = isinstance(self._graph.module(node), ops.BATCH_NORMS)
        return norm or self._graph.matches(node, ops.MULTIPLY | ops.AVERAGE | ops.RESAMPLE)

    def _is_wanted(self, node: fx.Node) -> bool:
        """Return True if an integer operator reads a tensor, perhaps behind operators that move or activate values."""
        waiting, seen = [node], {node}
        while waiting:
            for reader in self._graph.readers(waiting.pop()):
                if reader in self.nodes or reader in self._layers or self._graph.matches(reader, ops.AVERAGE):
                    return True
                passes = self._graph.matches(reader, _ACTIVATION | ops.MULTIPLY | ops.RESAMPLE)
                if (passes or self._graph.preserves_values(reader)) and reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
        return False
