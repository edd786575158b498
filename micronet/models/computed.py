"""Parameters that a network computes at each forward, such as normalized weights, made plain ones."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from micronet.models.modes import eval_mode


@torch.no_grad()
def make_plain(model: nn.Module, kept: Collection[str] = ()) -> list[str]:
    """Turn computed parameters into plain ones with the values of eval mode, in place.

    They are what ``torch.nn.utils`` computes by ``weight_norm``, ``spectral_norm``, ``parametrize`` and ``prune``.
    ``kept``: the names of those that stay computed.

    Returns:
        The parameters' names.
    """
    made = []
    with eval_mode(model):
        for name, module in model.named_modules():
            for own, remove in _computed(module):
                names = [f"{name}.{each}".lstrip(".") for each in own]
                if set(names).isdisjoint(kept):
                    remove()
                    made += names
    return made


def is_computed(module: nn.Module) -> bool:
    """Return True if some of a module's own parameters are computed."""
    return bool(_computed(module))


def _computed(module: nn.Module) -> list[tuple[Iterable[str], Callable[[], object]]]:
    """Return the names of a module's computed parameters, with what makes them plain."""
    found: list[tuple[Iterable[str], Callable[[], object]]] = []
    if parametrize.is_parametrized(module):
        found.append((list(module.parametrizations), partial(_remove_parametrizations, module)))  # type: ignore[arg-type]
    pruning = sys.modules.get("torch.nn.utils.prune")  # without it, no network is pruned by it
    for hook in module._forward_pre_hooks.values():  # torch has no public way to find its hooks
        if isinstance(hook, WeightNorm):
            found.append(([hook.name], partial(remove_weight_norm, module, hook.name)))
        elif isinstance(hook, SpectralNorm):
            found.append(([hook.name], partial(_remove_spectral_norm, module, hook.name)))
        elif pruning is not None and isinstance(hook, pruning.BasePruningMethod):
            found.append(([hook._tensor_name], partial(pruning.remove, module, hook._tensor_name)))
    return found


def _remove_spectral_norm(module: nn.Module, name: str) -> None:
    """Do what torch's function of this name does, and remove what it leaves: a hook that asks for the old tensors."""
    remove_spectral_norm(module, name)
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        fn = getattr(getattr(hook, "hook", hook), "fn", None)  # torch wraps it, so its own function does not see it
        if isinstance(fn, SpectralNorm) and fn.name == name:
            del hooks[key]


def _remove_parametrizations(module: Any) -> None:
    """Do what torch's function of this name does, but not to the class, which copies of the network share."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    trained = {
        name for name, own in module.parametrizations.items() if any(True for _ in own.parameters(recurse=False))
    }
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        if name in trained:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)


def weight_owners(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose weight is a plain parameter that no other module uses; a list of parameters is none."""
    users = Counter(
        id(parameter)
        for module in model.modules()
        if not isinstance(module, (nn.ParameterList, nn.ParameterDict))
        for parameter in module.parameters(recurse=False)
    )
    return {
        module
        for module in model.modules()
        if not hasattr(module, "parametrizations")
        and "weight" in module._parameters  # a weight-norm hook computes it and leaves no parameter of that name
        and all(users[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }
