"""Keep ``len(x)`` of a tensor symbolic while torch exports a network, as ``x.shape[0]`` is.

Python's own ``len`` must return a plain int, so that torch fixes the batch size of the example in the file.
"""

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ONE_EXPORT = threading.RLock()  # at a time: overlapping contexts of threads would take each other's name away


@contextmanager
def lengths_stay_free(model: nn.Module) -> Iterator[None]:
    """Inside this context, the code of a network's modules calls another ``len``, by the name in its global names."""
    with _ONE_EXPORT:
        spaces = _name_spaces(model)
        for names in spaces:
            names["len"] = _length
        try:
            yield
        finally:
            for names in spaces:
                del names["len"]


def _name_spaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the global names that the code of a network's modules sees, where none of them is ``len``."""
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        names = getattr(module.forward, "__globals__", None)
        if names is not None and not str(names.get("__name__")).startswith("torch.") and "len" not in names:
            found[id(names)] = names
    return list(found.values())


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)
