"""Networks in evaluation mode for a while, and copies of them."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

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


def train_as_evaluated(model: nn.Module) -> None:
    """Let a network be trained as it is evaluated: with the statistics of its norms, and without dropout.

    On GPUs, recurrent layers are in training mode, in which alone cuDNN computes their gradients.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and any(each.device.type != "cpu" for each in module.parameters()):
            module.train()


@contextmanager
def layers_called() -> Iterator[None]:
    """Let torch's transformers call their layers, on plain tensors, instead of a fused kernel of their own."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes, submodules, mode and the values of its buffers back afterwards.

    A forward may store what it computed for the next call, count its calls or build a layer. Lists, dictionaries and
    sets that are attributes get their items back; what lies deeper does not.
    """
    modules = list(model.modules())
    attributes = [(module, vars(module).copy()) for module in modules]
    kinds = (dict, list, set)
    held = [(x, x.copy()) for _, own in attributes for x in own.values() if isinstance(x, kinds)]
    buffers = [(x, x.clone()) for x in model.buffers() if not x.is_inference() and not x.is_meta]
    try:
        yield
    finally:
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for collection, items in held:
            collection.clear()
            add: Any = collection.extend if isinstance(collection, list) else collection.update
            add(items)
        with torch.no_grad():
            for buffer, values in buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """Give the CPU's random numbers, and those of the network's devices, their state back afterwards."""
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for device in {tensor.device for tensor in (*model.parameters(), *model.buffers())}:
            if device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "get_rng_state"):
                forks.enter_context(torch.random.fork_rng(devices=[device.index or 0], device_type=device.type))
        yield


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network; raise MicronetError if it holds something that cannot be copied.

    Tensors that a forward computed and stored, such as the weights of torch's old weight norm or what it caches in a
    dict, lose their gradients.
    """
    held = (x for module in model.modules() for x in tree_leaves(vars(module)) if isinstance(x, torch.Tensor))
    computed: dict[int, Any] = {id(x): x.detach().clone() for x in held if not x.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:  # locks, open files, scripted functions
        raise MicronetError(
            f"the network cannot be copied: {first_line(error)}; remove the attribute that cannot be copied"
        ) from error
