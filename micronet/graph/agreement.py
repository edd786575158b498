"""Whether a network and its traced graph compute the same."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from micronet.graph.uncompiled import uncompiled_modules
from micronet.models.device import copied
from micronet.models.modes import eval_mode, random_kept, state_kept
from micronet.models.outputs import other_values, tensors_in

ROUNDING = 1e-3  # relative to the output's norm: far above rounding errors, far below another computation


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
    return _agree_if_taken(model, recorded, more)


def follows_sizes(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True unless a network computes something else for other images or lengths than its record.

    Equal sizes change together, to half and to twice. Sizes that the network refuses say nothing against its record.
    """
    batched = len({x.shape[:1] for x in inputs if isinstance(x, Tensor)}) == 1
    few = tuple(x[:2] if batched and isinstance(x, Tensor) and x.dim() else x for x in inputs)
    return all(_agree_if_taken(model, recorded, given) for given in _resized(few))


def _resized(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of other sizes, the batch's apart."""
    sizes = {size for x in inputs if isinstance(x, Tensor) for size in x.shape[1:] if size > 1}
    for size in sorted(sizes):
        for indices in (torch.arange(size // 2), torch.arange(2 * size) % size):
            yield tuple(_with_size(x, size, indices) if isinstance(x, Tensor) else x for x in inputs)


def _with_size(x: Tensor, size: int, indices: Tensor) -> Tensor:
    for axis in range(1, x.dim()):
        if x.shape[axis] == size:
            x = x.index_select(axis, indices.to(x.device))
    return x


def _agree_if_taken(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True unless a network takes inputs for which its record computes something else, or fails."""
    try:
        with state_kept(model), eval_mode(model), uncompiled_modules(), torch.no_grad():
            model(*copied(inputs))
    except Exception:  # a user's forward may raise anything
        return True
    try:
        return agree(model, recorded, inputs, rounding=ROUNDING)  # plain layers may add up in another order
    except Exception:  # the record of a forward that fixes sizes may do so, too
        return False


def agree(model: nn.Module, recorded: nn.Module, inputs: tuple[Any, ...], rounding: float = 0.0) -> bool:
    """Return True if a network and its graph compute the same values, NaN included."""
    runs = (model, recorded.forward)  # calling a graph module would print what fails
    outputs = []
    with state_kept(model), eval_mode(model, recorded), uncompiled_modules(), torch.no_grad():
        for run in runs:
            with random_kept(model):  # so that both draw the same numbers
                outputs.append(run(*copied(inputs)))
    (expected, others), (actual, more) = ((tensors_in(each), other_values(each)) for each in outputs)
    return (
        len(expected) == len(actual)
        and others == more
        and all(x.shape == y.shape and _is_close(x, y, rounding) for x, y in zip(expected, actual, strict=True))
    )


def _is_close(x: Tensor, y: Tensor, rounding: float) -> bool:
    """Return True if y differs from x by at most ``rounding`` times the norm of x's finite values."""
    differ = (x != y) & ~(x.isnan() & y.isnan())
    exact = torch.complex128 if x.is_complex() else torch.float64  # in float32, the norm of large values is infinite
    x, y, finite = x.to(exact), y.to(exact), x[x.isfinite()].to(exact)
    return not bool(differ.any()) or bool((x - y)[differ].norm() <= rounding * finite.norm())
