"""NumPy's values in a forward, which the code of a graph cannot name."""

from typing import Any

import numpy as np
import torch


def from_numpy(value: Any) -> Any:
    """Return a NumPy number as Python's, an array as a tensor, and any other value as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value))
    return value
