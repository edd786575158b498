"""What a network takes: batches as users give them, and inputs described in JSON, from which examples are made."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError, count
from micronet.models.calling import input_names, plain_names, release, take_in_order, takes_names
from micronet.models.device import Inputs
from micronet.models.modes import eval_mode, state_kept
from micronet.models.spec import check_described

TORCHSCRIPT = "a TorchScript network (torch.jit.script or trace)"
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


def inputs_in(model: nn.Module, batch: Any) -> Any:
    """Return the inputs in a batch: a tensor or, for a network with several inputs, ``Inputs``.

    Args:
        model: The network; the arguments that its forward requires say how many inputs there are.
        batch: A tensor; a tuple or list that begins with the inputs, as ``(images, labels)`` or ``(left, right)``; or a
            mapping from names of the forward's arguments to tensors, in which optional arguments may occur, too.

    Raises:
        MicronetError: Inputs are missing, or not tensors; or the network is TorchScript, whose forward does not say.
    """
    if isinstance(batch, (Tensor, Inputs)):
        return batch
    if isinstance(model, nn.parallel.DistributedDataParallel):  # its own forward takes anything
        model = model.module
    check_python(model)
    parameters = [each for each in inspect.signature(model.forward).parameters.values() if each.kind in _BY_ORDER]
    if isinstance(batch, Mapping):
        found = _by_name(parameters, batch)
    else:
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        required = len(items) if several else max(1, sum(each.default is each.empty for each in parameters))
        if len(items) < required:
            raise MicronetError(
                f"a batch holds {count(len(items), 'item')}, but forward() takes {count(required, 'input')} "
                f"({', '.join(each.name for each in parameters[:required])}); pass a tuple that starts with them"
            )
        found = items[:required]
    if not found or not all(isinstance(each, Tensor) for each in found):
        got = ", ".join(type(each).__name__ for each in found) or "nothing"
        raise MicronetError(
            "expected batches that are tensors, tuples that start with the inputs, or dicts keyed by input name; got "
            f"{got}"
        )
    return found[0] if len(found) == 1 else Inputs(found)


def check_python(model: nn.Module) -> None:
    """Raise MicronetError if a network is TorchScript, whose forward cannot be read."""
    if isinstance(model, torch.jit.ScriptModule):
        raise MicronetError(f"the network is {TORCHSCRIPT}; pass the Python network that it was made from")


def settle_order(model: nn.Module, batch: Any) -> list[dict[str, Any]] | None:
    """Make a network take the tensors of a batch by their order, in place, if it takes them by name or in a dict.

    Returns:
        The inputs' description, with their names, if the order had to be settled; otherwise None.
    """
    take_in_order(model)
    if isinstance(batch, Mapping):
        given = {str(key): value for key, value in batch.items() if isinstance(value, Tensor)}
        own = list(inspect.signature(model.forward).parameters)
        names = sorted(given.keys() & set(own), key=own.index) or list(given)
        take_in_order(model, describe_inputs([given[name] for name in names], names))
        if takes_names(model) and not given.keys() & set(own) and not _accepts(model, batch):
            release(model)
    if not takes_names(model):
        return None
    found = inputs_in(model, batch)
    samples = [x[0] if x.dim() else x for x in (found if isinstance(found, Inputs) else (found,))]
    return describe_inputs(samples, input_names(model))


def _accepts(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return True if a network accepts a dict as it is."""
    own = next(model.parameters(), torch.empty(0)).device
    inputs = {key: value.to(own) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        with state_kept(model), eval_mode(model), torch.no_grad():
            model(*(inputs[name] for name in input_names(model)))
    except Exception:  # a user's forward may raise anything
        return False
    return True


def describe_inputs(inputs: Sequence[Tensor], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the shapes, the types and the names, if given, of tensors as JSON."""
    found: list[dict[str, Any]]
    found = [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in inputs]
    return found if names is None else [{**each, "name": name} for each, name in zip(found, names, strict=True)]


def make_inputs(described: list[dict[str, Any]], samples: int | None = None) -> tuple[Tensor, ...]:
    """Return inputs of the described shapes and types: floats between 0 and 1, always the same; other numbers are 1.

    A 0 would often be padding, and attention to nothing but padding gives NaN.

    Args:
        described: What ``describe_inputs`` returned.
        samples: The length of a new first axis; None: the shapes include it.

    Raises:
        TypeError, ValueError, KeyError: A damaged file describes something else.
    """
    check_described(described)
    numbers = torch.Generator().manual_seed(0)
    made = []
    for each in described:
        shape, dtype = [*([] if samples is None else [samples]), *each["shape"]], getattr(torch, each["dtype"])
        is_float = dtype.is_floating_point
        made.append(torch.rand(shape, generator=numbers).to(dtype) if is_float else torch.ones(shape, dtype=dtype))
    return tuple(made)


_BY_ORDER = (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
)  # fmt: skip


def _by_name(parameters: list[inspect.Parameter], batch: Mapping[str, Any]) -> list[Any]:
    """Return a mapping's tensors in the order of the forward's arguments; other keys, such as labels, are ignored."""
    batch, found = {**dict(zip(plain_names(map(str, batch)), batch.values(), strict=True)), **batch}, []
    for each in parameters:
        if each.name not in batch:
            if each.default is each.empty and each.kind is not each.VAR_POSITIONAL:
                names = ", ".join(map(str, batch)) or "nothing"
                raise MicronetError(f"a batch has no {each.name}, which forward() requires; it has {names}")
            break  # arguments are passed by their order, so later ones cannot be given either
        found.append(batch[each.name])
    return found
