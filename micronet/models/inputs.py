"""What a network takes: batches as users give them, and inputs described in JSON, from which examples are made."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError, count
from micronet.models.device import Inputs

LARGEST_INPUT = 2**28  # values; loading a file runs its network on such inputs
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


def inputs_in(model: nn.Module, batch: Any) -> Any:
    """Return the inputs in a batch: a tensor or, for a network with several inputs, ``Inputs``.

    Args:
        model: The network; the arguments that its forward requires say how many inputs there are.
        batch: A tensor; a tuple or list that begins with the inputs, as ``(images, labels)`` or ``(left, right)``; or a
            mapping from names of the forward's arguments to tensors, in which optional arguments may occur, too.

    Raises:
        MicronetError: Inputs are missing, or not tensors.
    """
    if isinstance(batch, (Tensor, Inputs)):
        return batch
    if isinstance(model, nn.parallel.DistributedDataParallel):  # its own forward takes anything
        model = model.module
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


def describe_inputs(inputs: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return the shapes and types of tensors as JSON."""
    return [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in inputs]


def check_described(inputs: Any) -> None:
    """Raise TypeError or ValueError unless this is what ``describe_inputs`` returns, of at most 2^28 values each."""
    for each in inputs:
        shape, dtype = each["shape"], getattr(torch, str(each["dtype"]), None)
        if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise TypeError(f"the shape {shape!r} is invalid")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the type {each['dtype']!r} is invalid")
        if math.prod(shape) > LARGEST_INPUT:
            raise ValueError(f"an input has more than {LARGEST_INPUT:,} values")


def make_inputs(described: list[dict[str, Any]], samples: int | None = None) -> tuple[Tensor, ...]:
    """Return inputs of the described shapes and types: floats between 0 and 1, always the same; other numbers are 0.

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
        made.append(torch.rand(shape, generator=numbers).to(dtype) if is_float else torch.zeros(shape, dtype=dtype))
    return tuple(made)


_BY_ORDER = (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
)  # fmt: skip


def _by_name(parameters: list[inspect.Parameter], batch: Mapping[str, Any]) -> list[Any]:
    """Return a mapping's tensors in the order of the forward's arguments; other keys, such as labels, are ignored."""
    found = []
    for each in parameters:
        if each.name not in batch:
            if each.default is each.empty and each.kind is not each.VAR_POSITIONAL:
                names = ", ".join(map(str, batch)) or "nothing"
                raise MicronetError(f"a batch has no {each.name}, which forward() requires; it has {names}")
            break  # arguments are passed by their order, so later ones cannot be given either
        found.append(batch[each.name])
    return found
