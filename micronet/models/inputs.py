"""An example input of a network: one tensor, or a tuple of positional arguments."""

from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | tuple[Any, ...]


def as_inputs(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Return an example as positional arguments on the network's device, floats in the network's dtype."""
    reference = next(model.parameters(), torch.empty(0))
    inputs = example if isinstance(example, tuple) else (example,)
    return tuple(_like(reference, x) if isinstance(x, Tensor) else x for x in inputs)


def _like(reference: Tensor, x: Tensor) -> Tensor:
    return x.to(reference.device, reference.dtype if x.is_floating_point() else None)
