"""Networks that run a graph."""

from typing import Any

from torch import fx, nn


class GraphModule(fx.GraphModule):
    """A graph module that only raises its errors; torch's prints a traceback as well."""

    def recompile(self) -> Any:
        """Compile the graph into a forward; return its code."""
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]  # each instance has a class of its own
        return code
