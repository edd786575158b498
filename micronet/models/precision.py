"""Weights in half precision, which pruning and quantizing do not take."""

import torch
from torch import nn

from micronet.errors import MicronetError, listed

_HALVES = torch.float16, torch.bfloat16
WAY_ON = "convert them with model.float(), and make the forward keep its inputs in float32"


def half_precision(model: nn.Module) -> str:
    """Return which parameters are float16 or bfloat16, as the end of a sentence; "" if none are."""
    kinds = {name: each.dtype for name, each in model.named_parameters() if each.dtype in _HALVES}
    if not kinds:
        return ""
    kind = str(next(iter(kinds.values()))).removeprefix("torch.")
    everything = len(kinds) == len(list(model.named_parameters()))
    return f"the network's weights are {kind}" if everything else f"{listed(list(kinds), 3)} of the network are {kind}"


def check_precision(model: nn.Module, work: str) -> None:
    """Raise MicronetError if a network has weights in half precision; ``work``: what needs others."""
    if found := half_precision(model):
        raise MicronetError(f"{found}, but {work} needs float32; {WAY_ON}")
