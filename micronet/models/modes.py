"""Networks in evaluation mode for a while, and copies of them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType
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

    Functions that modules hold as attributes or hooks refer to the copies of its modules. Tensors that a forward
    computed and stored, such as the weights of torch's old weight norm or what it caches in a dict, lose their
    gradients.
    """
    held = (x for module in model.modules() for x in tree_leaves(vars(module)) if isinstance(x, torch.Tensor))
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in held if not x.is_leaf}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # locks, open files, scripted functions
        raise MicronetError(
            f"the network cannot be copied: {first_line(error)}; remove the attribute that cannot be copied"
        ) from error
    for module in copied.modules():
        for holder in (vars(module), *(x for x in vars(module).values() if isinstance(x, dict))):
            for name, function in [(name, x) for name, x in holder.items() if isinstance(x, FunctionType)]:
                holder[name] = _rebound(function, memo)
    return copied


def _rebound(function: FunctionType, copies: Mapping[int, Any]) -> FunctionType:
    """Return a function that a module holds, such as a hook, for the copy: with copies of the modules it refers to."""
    values = [cell.cell_contents if _is_filled(cell) else None for cell in function.__closure__ or ()]
    if not any(isinstance(value, nn.Module) and id(value) in copies for value in values):
        return function
    cells = [
        CellType(copies[id(value)]) if isinstance(value, nn.Module) and id(value) in copies else cell
        for value, cell in zip(values, function.__closure__ or (), strict=True)
    ]
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update(vars(function))
    return made


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def check_modes(model: nn.Module) -> None:
    """Raise MicronetError if a network's weights are others in eval mode, as LoRA's, which are merged there.

    Its state would be saved in eval mode, and merged once more when it is loaded.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return
    states = []
    for training in (True, False):
        try:
            with random_kept(model):
                trial = copy_model(model).train(training)
        except Exception:  # a user's method may raise anything
            return
        states.append({name: tensor for name, tensor in trial.state_dict().items() if not tensor.is_meta})
    changed = [*(states[0].keys() ^ states[1].keys())]
    changed += [name for name, x in states[0].items() if not changed and not _are_equal(x, states[1][name])]
    if changed:
        raise MicronetError(
            f"the network rewrites {min(changed)} when its mode changes (train() or eval()), as LoRA's layers do "
            "to merge their weights; merge them permanently, and import the merged network"
        )


def _are_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return (x.dtype, x.shape) == (y.dtype, y.shape) and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return True if two tensors are alike to the bit: NaN equals NaN, and -0 differs from 0."""
    bits = (each.reshape(-1).contiguous().view(torch.uint8) for each in (x, y))
    return (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape) and torch.equal(*bits)
