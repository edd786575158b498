"""Networks that run a graph, and what no graph of a network uses."""

from collections.abc import Iterable
from typing import Any

from torch import fx, nn


class GraphModule(fx.GraphModule):
    """A graph module that only raises its errors; torch's prints a traceback as well."""

    def recompile(self) -> Any:
        """Compile the graph into a forward; return its code."""
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]  # each instance has a class of its own
        return code


def uncalled(model: nn.Module, graphs: Iterable[fx.Graph]) -> list[str]:
    """Return the modules that hold parameters which a network's graphs do not use; of nested ones, the outermost."""
    used = {f"{node.target}." for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")}
    found: list[str] = []
    for name, module in model.named_modules():
        inner = f"{name}."
        known = any(inner.startswith(f"{outer}.") for outer in found)
        if name and not known and next(module.parameters(), None) is not None:
            found += [] if any(inner.startswith(each) or each.startswith(inner) for each in used) else [name]
    return found
