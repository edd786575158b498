"""Networks in evaluation mode for a while, and copies of them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from micronet.errors import MicronetError, first_line


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode inside this context; every module gets its own mode back afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network; raise MicronetError if it holds something that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # hooks of old-style weight norms, locks, open files
        raise MicronetError(
            f"the network cannot be copied: {first_line(error)}; remove hooks such as weight_norm, or any attribute "
            "that cannot be copied"
        ) from error
