"""Whether a network and its traced graph compute the same."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from micronet.graph.uncompiled import uncompiled_modules
from micronet.models.device import copied
from micronet.models.modes import eval_mode, random_kept, state_kept
from micronet.models.outputs import other_values, tensors_in

# Relative to the output's norm: far above rounding errors, as of layers that add up in another order, far below another
# computation.
ROUNDING = 1e-3


def computes_same(model: nn.Module, network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True if a symbolic trace computes in eval mode what its network computes, rounding errors apart.

    torch.fx runs a forward on proxies, which are never None and raise no errors, so it may go another way.
    """
    try:
        return agree(model, network, inputs, rounding=ROUNDING)
    except Exception:  # a user's forward may raise anything
        return False


def follows_batch(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True unless a network computes something else for one more sample than its record, which may fix the size.

    A network that takes no other batch, or whose inputs do not have one length, says nothing against its record.
    """
    if len({x.shape[:1] for x in inputs if isinstance(x, Tensor)}) != 1:
        return True
    more = tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() else x for x in inputs)
    return agree_if_taken(model, recorded, more, ROUNDING)


def follows_sizes(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True unless a network computes something else for other images or lengths than its record.

    Equal sizes change together, to a quarter, half, three quarters and twice. Sizes that the network refuses say
    nothing against its record.
    """
    batched = len({x.shape[:1] for x in inputs if isinstance(x, Tensor)}) == 1
    few = tuple(x[:2] if batched and isinstance(x, Tensor) and x.dim() else x for x in inputs)
    return all(agree_if_taken(model, recorded, given, ROUNDING) for given in _resized(few))


def _resized(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of other sizes, the batch's apart."""
    sizes = {size for x in inputs if isinstance(x, Tensor) for size in x.shape[1:] if size > 1}
    for size in sorted(sizes):
        for other in sorted({size // 4, size // 2, 3 * size // 4, 2 * size} - {0}):
            indices = torch.arange(other) % size
            yield tuple(_with_size(x, size, indices) if isinstance(x, Tensor) else x for x in inputs)


def _with_size(x: Tensor, size: int, indices: Tensor) -> Tensor:
    for axis in range(1, x.dim()):
        if x.shape[axis] == size:
            x = x.index_select(axis, indices.to(x.device))
    return x


def agree_if_taken(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...], rounding: float = 0.0) -> bool:
    """Return True unless a network takes inputs for which its record computes something else, or fails."""
    try:
        expected = _outputs(model, model, inputs)
    except Exception:  # a user's forward may raise anything, such as for codes beyond an embedding's
        return True
    try:
        return _are_close(expected, _outputs(model, recorded, inputs), rounding)
    except Exception:  # the record of a forward that fixes sizes may do so, too
        return False


def agree(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...], rounding: float = 0.0) -> bool:
    """Return True if a network and its graph compute the same values, NaN included."""
    return _are_close(_outputs(model, model, inputs), _outputs(model, recorded, inputs), rounding)


def _outputs(model: nn.Module, network: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return what a network, or a record of it, returns in eval mode; state and random numbers stay as they were."""
    run = network if network is model else network.forward  # calling a graph module would print what fails
    with state_kept(model), eval_mode(model, network), uncompiled_modules(), torch.no_grad(), random_kept(model):
        return run(*copied(inputs))


def _are_close(expected: Any, actual: Any, rounding: float) -> bool:
    """Return True if outputs of two runs have the same structure and values."""
    tensors, others = tensors_in(expected), tensors_in(actual)
    return (
        len(tensors) == len(others)
        and other_values(expected) == other_values(actual)
        and all(x.shape == y.shape and _is_close(x, y, rounding) for x, y in zip(tensors, others, strict=True))
    )


def _is_close(x: Tensor, y: Tensor, rounding: float) -> bool:
    """Return True if y differs from x by at most ``rounding`` times the norm of x's finite values."""
    differ = (x != y) & ~(x.isnan() & y.isnan())
    exact = torch.complex128 if x.is_complex() else torch.float64  # in float32, the norm of large values is infinite
    x, y, finite = x.to(exact), y.to(exact), x[x.isfinite()].to(exact)
    return not bool(differ.any()) or bool((x - y)[differ].norm() <= rounding * finite.norm())
