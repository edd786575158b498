"""Which modules are one node of a traced graph."""

import copy
import math
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from micronet.models.modes import state_kept

_FROZEN = {"weight", "bias", "running_mean", "running_var"}


def is_leaf(module: nn.Module) -> bool:
    """Return True for torch's own modules except containers, those that set ``is_leaf``, scripted ones, and norms."""
    own = getattr(module, "is_leaf", None)
    if own is not None:
        return bool(own)
    if isinstance(module, torch.jit.ScriptModule):
        return True  # its code is not Python's
    if _is_of_torch(module):
        return not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.DataParallel))
    return is_frozen_norm(module) or passes_in_eval(module)


def find_leaves(model: nn.Module, *, into_leaves: bool = False) -> set[nn.Module]:
    """Return the modules of a network that are one node of its graph, so that each is examined once.

    ``into_leaves``: whether those that set ``is_leaf`` are examined like others.
    """
    found = set(filter(is_leaf, model.modules()))
    return {leaf for leaf in found if getattr(leaf, "is_leaf", None) is None} if into_leaves else found


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def is_frozen_norm(module: nn.Module) -> bool:
    """Return True if a module is a batch norm with fixed statistics, such as detectors' ``FrozenBatchNorm2d``."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if not buffers.keys() >= _FROZEN or any(True for _ in module.parameters()):
        return False
    return buffers.keys() <= _FROZEN | {"num_batches_tracked"} and {buffers[name].dim() for name in _FROZEN} == {1}


@torch.no_grad()
def frozen_eps(module: nn.Module) -> float | None:
    """Return what a frozen batch norm adds to its variances, or None if it computes anything else.

    With equal variances v, ones become 1 / sqrt(v + eps).
    """
    try:
        norm: Any = copy.deepcopy(module).cpu().double()
        x, values = torch.ones(1, len(norm.weight), 1, 1).double(), torch.linspace(0.5, 2, len(norm.weight)).double()
        for name, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1e-4}.items():
            getattr(norm, name).fill_(value)
        eps, own = round(float(norm(x).flatten()[0] ** -2) - 1e-4, 15), getattr(module, "eps", None)
        eps = own if isinstance(own, float) and math.isclose(own, eps, abs_tol=1e-8) else eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(values)
        expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=eps)
        return eps if torch.allclose(norm(x), expected) else None
    except Exception:  # a user's forward may raise anything
        return None


def passes_in_eval(module: nn.Module) -> bool:
    """Return True if a module of the user's returns its only input in eval mode but not while training."""
    if any(True for _ in module.children()) or module._parameters or module._buffers or _is_of_torch(module):
        return False
    if getattr(module.forward, "__func__", None) is nn.Identity.forward or isinstance(module, nn.Dropout):
        return False
    return _returns_input(module, training=False) and not _returns_input(module, training=True)


def _returns_input(module: Any, *, training: bool) -> bool:
    try:
        with state_kept(module):  # a forward may store proxies
            module.training = training
            nodes = list(fx.Tracer().trace(module).nodes)
    except Exception:  # a user's forward may raise anything when it runs on proxies
        return False
    inputs = [node for node in nodes if node.op == "placeholder"]
    return bool(inputs) and nodes[-1].args == (inputs[0],) and len(nodes) == len(inputs) + 1
