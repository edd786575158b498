"""Operations that no table names: whether each channel of the result depends on the same channel of the inputs alone.

Such an operation is run on random numbers, with all channels and with some of them. If the second result is the part of
the first that belongs to those channels, in several ranges of numbers and for two choices of channels, the operation is
taken to compute every channel from itself. That is sampled evidence, no proof: an operation may mix channels beyond
those numbers alone, or too little to be seen. So operations known to do that are named here, and ``check_cut`` compares
the pruned network with the whole one.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from micronet.models.modes import eval_mode, random_kept, state_kept
from micronet.pruning.group_table import GroupTable
from micronet.pruning.ids import FIXED, Ids, dense, distinct, groups_of, ids_along, spread, varies
from micronet.pruning.node_call import NodeCall
from micronet.pruning.recording import RandomTensor
from micronet.pruning.traced_network import TracedNetwork

# Of the random numbers: a logarithm needs positive ones, and some operations mix channels of large ones only.
_RANGES = (-1.0, 1.0), (0.1, 1.0), (-20.0, 20.0), (-1e4, 1e4)
_TOLERANCE = 1e-4  # relative to the largest value: fewer terms may be added up in another order
# These mix channels: the first two only those of a large norm, the others by as little as their factor says.
_MIXING = {"renorm", "embedding_renorm", "local_response_norm"}
_MIXING_MODULES = nn.LocalResponseNorm, nn.CrossMapLRN2d


class ChannelAxis(NamedTuple):
    """Where a result has its channels: the axis, and how many values a unit of the inputs' channels gives it."""

    axis: int
    values: int


@dataclass(frozen=True)
class _Trial:
    """A call and its arguments' leaves, of which some tensors hold channels along an axis (leaf's index -> axis)."""

    call: NodeCall
    leaves: Sequence[Any]
    structure: Any
    axes: Mapping[int, int]
    unit: int  # channels that only go together

    def channel_axes(self) -> list[ChannelAxis] | None:
        """Return where each tensor of the result has its channels, if it computes each unit from itself alone."""
        sizes = {self.leaves[index].shape[axis] for index, axis in self.axes.items()}
        units = min(sizes) // self.unit
        if len(sizes) > 1 or units < 2:
            return None
        module = self.call.module or nn.Identity()
        try:
            with torch.no_grad(), state_kept(module), eval_mode(module), random_kept(module):
                return self._compare(units)
        except Exception:  # other sizes of the channels' axis do not fit
            return None

    def _compare(self, units: int) -> list[ChannelAxis] | None:
        generator = torch.Generator().manual_seed(0)
        choices = _choices(units, generator)
        result: list[ChannelAxis] | None = None
        for ends in _RANGES:
            drawn = [leaf.draw(ends, generator) if isinstance(leaf, RandomTensor) else leaf for leaf in self.leaves]
            whole = self._run(drawn)
            for some in choices:
                part = self._run([self._part(i, leaf, some) for i, leaf in enumerate(drawn)])
                axes = _channel_axes(whole, part, units, some)
                if axes is None:
                    return None
            result = axes if all(map(_tells, whole)) else result
        return result

    def _part(self, index: int, leaf: Any, units: Tensor) -> Any:
        if index not in self.axes:
            return leaf
        return leaf.index_select(self.axes[index], _of_units(units, self.unit).to(leaf.device))

    def _run(self, leaves: Sequence[Any]) -> list[Tensor]:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # it may write into them
        args, kwargs = tree_unflatten(leaves, self.structure)
        result = replace(self.call, args=args, kwargs=kwargs).run()
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _of_units(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def _choices(units: int, generator: torch.Generator) -> list[Tensor]:
    """Return two choices of half of the units: the last and not the first, and the reverse.

    An operation may count channels from either end, as ``index_fill(1, [-1], 0)`` does.
    """
    between = torch.randperm(units - 2, generator=generator)[: units // 2 - 1] + 1
    some = torch.cat([between, torch.tensor([units - 1])]).sort().values
    return [some, (units - 1 - some).flip(0)]


def _channel_axes(whole: list[Tensor], part: list[Tensor], units: int, some: Tensor) -> list[ChannelAxis] | None:
    """Return where each tensor has the channels of some units, given those of a call with these alone."""
    if not whole or len(whole) != len(part):
        return None
    found = [_channel_axis(one, other, units, some) for one, other in zip(whole, part, strict=True)]
    axes = [axis for axis in found if axis is not None]
    return axes if len(axes) == len(found) else None


def _channel_axis(whole: Tensor, part: Tensor, units: int, some: Tensor) -> ChannelAxis | None:
    """Return where a result has the channels of some units, given a result with these alone."""
    if whole.dim() != part.dim():
        return None
    axes = [axis for axis in range(whole.dim()) if whole.size(axis) != part.size(axis)]
    values = whole.size(axes[0]) // units if len(axes) == 1 else 0
    if not values or whole.size(axes[0]) != values * units or part.size(axes[0]) != values * len(some):
        return None
    expected = whole.index_select(axes[0], _of_units(some, values).to(whole.device))
    if not expected.is_floating_point() and not expected.is_complex():
        return ChannelAxis(axes[0], values) if torch.equal(expected, part) else None
    scale = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
    close = torch.allclose(expected, part, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
    return ChannelAxis(axes[0], values) if close else None


def _tells(result: Tensor) -> bool:
    """Return False for a result that would be the same whatever channels it came from."""
    return bool(result.isfinite().all()) and bool((result != result.flatten()[0]).any())


def channelwise_ids(call: NodeCall, network: TracedNetwork, table: GroupTable) -> Any:
    """Run a call on ids if it computes each channel, or each block of channels, from itself alone, else return None.

    Channels of several inputs at the same place are cut together. If that is impossible, only those of one input are
    cut, and the others stay whole.
    """
    leaves, known = tree_leaves((call.args, call.kwargs)), tree_leaves(network.arguments.get(call.key))
    if len(leaves) != len(known):
        return None
    held = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and distinct(x)[-1] > FIXED}
    axes = {i: [axis for axis in range(x.dim()) if varies(x, axis)] for i, x in held.items()}
    varying = [i for i, along in axes.items() if along]
    if not varying or _mixes(call) or (call.writes and varying[0] != 0) or not _fits(leaves, known, axes):
        return None
    for chosen in [varying, *([i] for i in varying if len(varying) > 1)]:
        rest = [distinct(x) for i, x in held.items() if i not in chosen]
        own = np.concatenate([distinct(held[i]) for i in chosen])
        if set(groups_of(table.canonical(own))) & set(groups_of(table.canonical(np.concatenate([[FIXED], *rest])))):
            continue
        result = _follow(call, network, table, {i: held[i] for i in chosen}, {i: axes[i] for i in chosen})
        if result is not None:
            for ids in rest:
                table.pin(ids, f"{_name(call)} combines all its channels with each channel of another layer")
            return result
    return None


def _mixes(call: NodeCall) -> bool:
    """Return True for an operation that mixes channels, however little that shows in random numbers."""
    target = call.node.target
    name = getattr(target, "__name__", str(target)).strip("_")
    return name in _MIXING if call.module is None else isinstance(call.module, _MIXING_MODULES)


def _name(call: NodeCall) -> str:
    return f"{call.node.name} in forward()"


def _fits(leaves: Sequence[Any], known: Sequence[Any], axes: Mapping[int, Sequence[int]]) -> bool:
    """Return True if a call has the sizes that it had in the whole network, except along its axes of channels."""
    return all(
        _sizes(leaf.shape, axes.get(i, ())) == _sizes(before.shape, axes.get(i, ()))
        for i, (leaf, before) in enumerate(zip(leaves, known, strict=True))
        if isinstance(leaf, Tensor)
    )


def _sizes(shape: Sequence[int], without: Sequence[int]) -> list[int | None]:
    """Return the sizes of a shape's axes, None for some of them."""
    return [None if axis in without else size for axis, size in enumerate(shape)]


def _follow(
    call: NodeCall,
    network: TracedNetwork,
    table: GroupTable,
    held: Mapping[int, Tensor],
    axes: Mapping[int, Sequence[int]],
) -> Any:
    """Run a call on the ids of some arguments (leaf's index -> ids and the axes along which they differ)."""
    if all(len(along) == 1 for along in axes.values()):
        return _follow_channels(call, network, table, {i: (x, axes[i][0]) for i, x in held.items()})
    first, *others = held.values()
    if any(other.shape != first.shape for other in others) or len({tuple(along) for along in axes.values()}) > 1:
        return None
    along = next(iter(axes.values()))
    places = {axis: _probed(call, network, dict.fromkeys(held, axis), 1) for axis in along}
    apart = {axis: found for axis, found in places.items() if found}
    if not apart or FIXED in distinct(first) or any(place.values > 1 for found in apart.values() for place in found):
        return None
    for axis in set(along) - apart.keys():  # a block of channels goes as one
        table.merge(*(ids.numpy().ravel() for ids in dense(first.narrow(axis, 0, 1).expand_as(first), first)))
    for other in others:
        table.merge(*(ids.numpy().ravel() for ids in dense(first, other)))
    before = tree_leaves(network.arguments[call.key])[next(iter(held))].shape
    return _each(call.fixed, lambda i, x: first if x.shape == before else _blocks(first, x, i, apart))


def _blocks(ids: Tensor, fixed: Tensor, index: int, apart: Mapping[int, Sequence[ChannelAxis]]) -> Tensor:
    """Return the ids of a result whose axes of channels come from some of an input's."""
    axes = sorted(apart, key=lambda axis: apart[axis][index].axis)
    rest = [axis for axis in range(ids.dim()) if axis not in apart]
    for axis in rest:
        ids = ids.narrow(axis, 0, 1)
    shape, view = list(fixed.shape), [1] * fixed.dim()
    for axis in axes:
        shape[apart[axis][index].axis] = view[apart[axis][index].axis] = ids.size(axis)
    return ids.permute(*axes, *rest).reshape(view).expand(shape)


def _follow_channels(
    call: NodeCall, network: TracedNetwork, table: GroupTable, held: Mapping[int, tuple[Tensor, int]]
) -> Any:
    """Run a call on arguments with channels along one axis each."""
    found = [ids_along(x, axis) for x, axis in held.values()]
    ids = [each for each in found if each is not None]
    if len({len(each) for each in ids}) > 1:
        return None
    unit = _repeats(ids[0])
    places = _probed(call, network, {i: axis for i, (_, axis) in held.items()}, unit)
    if places is None:
        return None
    for other in ids[1:]:
        table.merge(ids[0], other)

    def placed(index: int, fixed: Tensor) -> Tensor:
        place = places[index]
        own = ids[0] if place.values == unit else np.repeat(ids[0][::unit], place.values)
        return spread(own, place.axis, (*fixed.shape[: place.axis], len(own), *fixed.shape[place.axis + 1 :]))

    return _each(call.fixed, placed)


def _each(result: Any, make: Callable[[int, Tensor], Tensor]) -> Any:
    """Return a result with other tensors; ``make`` gets each one's number too."""
    numbers = itertools.count()
    return tree_map(lambda x: make(next(numbers), x) if isinstance(x, Tensor) else x, result)


def _repeats(ids: Ids) -> int:
    """Return how many times in a row each channel occurs, if all occur equally often; otherwise 1."""
    starts = np.flatnonzero(np.diff(ids, prepend=-2))
    runs = set(np.diff(starts, append=len(ids)).tolist())
    return int(runs.pop()) if len(runs) == 1 else 1


def _probed(call: NodeCall, network: TracedNetwork, axes: Mapping[int, int], unit: int) -> list[ChannelAxis] | None:
    """Return where each tensor of the result has the channels that some arguments have along an axis."""
    key = call.key, tuple(axes.items()), unit
    if key not in network.probed:
        leaves, structure = tree_flatten(network.arguments[call.key])
        network.probed[key] = _Trial(call, leaves, structure, axes, unit).channel_axes()
    found: list[ChannelAxis] | None = network.probed[key]
    return found
