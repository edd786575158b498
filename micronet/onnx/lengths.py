"""Keep ``len(x)`` of a tensor symbolic while torch exports a network, as ``x.shape[0]`` is.

Python's own ``len`` must return a plain int, so that torch fixes the batch size of the example in the file.
"""

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def lengths_stay_free(model: nn.Module) -> Iterator[None]:
    """Inside this context, the code of a network's modules calls another ``len``, by the name in its global names."""
    spaces: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        names = getattr(module.forward, "__globals__", None)
        if names is not None and not names.get("__name__", "").startswith("torch.") and "len" not in names:
            spaces[id(names)] = names
    for names in spaces.values():
        names["len"] = _length
    try:
        yield
    finally:
        for names in spaces.values():
            del names["len"]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)
