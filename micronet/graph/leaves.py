"""Which modules are one node of a traced graph."""

from typing import Any

from torch import fx, nn

_FROZEN = {"weight", "bias", "running_mean", "running_var"}


def is_leaf(module: nn.Module) -> bool:
    """Return True for torch's own modules except containers, modules that set ``is_leaf``, and those named below."""
    own = getattr(module, "is_leaf", None)
    if own is not None:
        return bool(own)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, containers):
        return True
    return is_frozen_norm(module) or passes_in_eval(module)


def is_frozen_norm(module: nn.Module) -> bool:
    """Return True if a module is a batch norm with fixed statistics, such as detectors' ``FrozenBatchNorm2d``."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if not buffers.keys() >= _FROZEN or any(True for _ in module.parameters()):
        return False
    return buffers.keys() <= _FROZEN | {"num_batches_tracked"} and {buffers[name].dim() for name in _FROZEN} == {1}


def passes_in_eval(module: nn.Module) -> bool:
    """Return True if a module of the user's returns its only input in eval mode but not while training."""
    if any(True for _ in module.children()) or module._parameters or module._buffers:
        return False
    if getattr(module.forward, "__func__", None) is nn.Identity.forward or isinstance(module, nn.Dropout):
        return False
    return _returns_input(module, training=False) and not _returns_input(module, training=True)


def _returns_input(module: Any, *, training: bool) -> bool:
    mode, module.training = module.training, training
    try:
        nodes = list(fx.Tracer().trace(module).nodes)
    except Exception:  # a user's forward may raise anything when it runs on proxies
        return False
    finally:
        module.training = mode
    inputs = [node for node in nodes if node.op == "placeholder"]
    return bool(inputs) and nodes[-1].args == (inputs[0],) and len(nodes) == len(inputs) + 1
