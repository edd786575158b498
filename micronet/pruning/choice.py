"""Which old channels take the places of the channels of a narrower layer: the best ones that are read alike."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.group_table import ChannelGroup
from micronet.pruning.ids import FIXED, STRIDE, Ids

Signature = tuple[tuple[str, int], ...]


def fits(group: ChannelGroup, old: list[Signature], new: list[Signature]) -> bool:
    """Return True if old channels of a group can take the places of all new ones."""
    if len(new) == len(old):
        return new == old
    return Counter(_blocks(group, new)) <= Counter(_blocks(group, old))


def choose(
    group: ChannelGroup, scores: NDArray[np.float64] | None, old: list[Signature], new: list[Signature]
) -> list[int]:
    """Return the old channel for each position of a group's new width, from the part that it lies in.

    Blocks with the best mean scores are kept. ``scores`` may be None if all channels are.
    """
    if len(new) == len(old) or scores is None:
        return list(range(len(old)))
    places = _places(group, len(old))
    best = _best(scores[places].mean((0, 2)), _blocks(group, old), _blocks(group, new))
    kept: list[int] = places[:, best].ravel().tolist()
    return kept


def _places(group: ChannelGroup, width: int) -> Ids:
    """Return the places of a group's channels (parts, blocks, channels of a block)."""
    return np.arange(width).reshape(group.parts, -1, group.block or 1)


def _blocks(group: ChannelGroup, channels: list[Signature]) -> list[tuple[Signature, ...]]:
    """Return what each block of a group consists of."""
    return [tuple(channels[place] for place in block.ravel()) for block in _places(group, len(channels)).swapaxes(0, 1)]


def _best(scores: NDArray[np.float64], old: Sequence[Hashable], new: Sequence[Hashable]) -> list[int]:
    """Return for each new signature the best-scored old place with it, in order."""
    best = np.argsort(-scores, kind="stable").tolist()
    chosen = {
        signature: iter(sorted([place for place in best if old[place] == signature][:number]))
        for signature, number in Counter(new).items()
    }
    return [next(chosen[signature]) for signature in new]


def signatures(channels: ChannelMap) -> dict[int, list[Signature]]:
    """Return, for each channel of each group, the layers that read it and the part of a grouped layer it lies in.

    A channel may replace another one only if their signatures are equal.
    """
    found: dict[int, list[list[tuple[str, int]]]] = {
        number: [[] for _ in range(group.width)] for number, group in channels.groups.items()
    }
    ends: list[tuple[str, Ids, int]] = [(name, ids, 1) for name, ids in channels.norms.items()]
    ends += [(name, found.ids, 1) for name, found in channels.tensors.items()]
    for name, layer in channels.layers.items():
        if layer.inputs is not None:
            ends.append((f"{name} reads", layer.inputs, layer.parts))
        if layer.parts > 1:
            ends.append((f"{name} writes", layer.outputs, layer.parts))
    for reader, ids, parts in ends:
        size = len(ids) // parts
        for position, channel_id in enumerate(ids.tolist()):
            if channel_id != FIXED:
                group, channel = divmod(channel_id, STRIDE)
                found[group][channel].append((reader, position // size))
    return {group: [tuple(sorted(places)) for places in found_in] for group, found_in in found.items()}
