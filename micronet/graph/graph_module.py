"""Networks that run a graph, and what no graph of a network uses."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import fx, nn


class GraphModule(fx.GraphModule):
    """A graph module that only raises its errors; torch's prints a traceback as well."""

    def recompile(self) -> Any:
        """Compile the graph into a forward; return its code."""
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]  # each instance has a class of its own
        return code


def uncalled(model: nn.Module, owner: nn.Module, graphs: Iterable[fx.Graph]) -> list[str]:
    """Return the modules that hold parameters, none of which a network uses; of nested ones, the outermost.

    ``owner``: the network of the same parameters whose modules and tensors the graphs name.
    """
    used: set[int] = set()
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op == "call_module":
            used.update(map(id, owner.get_submodule(str(node.target)).parameters()))
        elif node.op == "get_attr":
            used.add(id(attrgetter(str(node.target))(owner)))
    found: list[str] = []
    for name, module in model.named_modules():
        inside = found and name.startswith(f"{found[-1]}.")
        parameters = [] if inside or not name else list(module.parameters())
        if parameters and used.isdisjoint(map(id, parameters)):
            found.append(name)
    return found
