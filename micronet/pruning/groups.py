"""The groups of channels of a network: which ones can have another width, and what it must be a multiple of.

The network is traced twice, the second time with twice the channels in every group. A group is pinned if the forward
uses fixed sizes, or if a layer's input does not grow with the channels that it reads. A split axis that does not grow
is a number of equal parts, so the width must be a multiple of it.
"""

import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
from torch import nn

from micronet.errors import MicronetError
from micronet.models import transformer
from micronet.models.device import Example
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.group_table import ChannelGroup
from micronet.pruning.ids import FIXED, STRIDE, groups_of
from micronet.pruning.traced_network import TracedNetwork, trace_network


def find_groups(model: nn.Module, example: Example, regular: int = 1, *, attributes: bool = True) -> ChannelMap:
    """Trace a network on an example input and return its channels, in groups that must be cut together.

    ``regular``: what widths should be multiples of. ``attributes``: change sizes that the user's modules hold. Raises
    MicronetError if the network cannot be traced.
    """
    return group_channels(trace_network(model, example, regular, attributes=attributes))


def find_groups_and_heads(
    model: nn.Module, example: Example, regular: int = 1, *, attributes: bool = True
) -> ChannelMap:
    """Return what ``find_groups`` does, for the network with torch's attentions split into layers if it can be."""
    if heads := transformer.splittable_attentions(model):
        with suppress(MicronetError, RuntimeError):  # for example a forward that reads an attention's own tensors
            return find_groups(transformer.with_split_layers(model, heads), example, regular)
    return find_groups(model, example, regular, attributes=attributes)


def group_channels(network: TracedNetwork) -> ChannelMap:
    """Return the channels of a traced network, in groups that must be cut together."""
    pinned: dict[int, str] = {}
    while True:
        channels = ChannelMap(network, pinned=pinned)
        widths = {number: group.width * (1 if group.pinned else 2) for number, group in channels.groups.items()}
        double = channels.with_widths(widths)
        if not (fixed := _fixed_groups(channels, double)):
            channels.groups = _with_multiples(channels, double)
            return channels
        pinned |= fixed


def _fixed_groups(channels: ChannelMap, double: ChannelMap) -> dict[int, str]:
    """Return the groups that turn out not to allow twice the width, and why."""
    found = {channels.table.root(group): why for group, why in double.pinned.items() if group in channels.table.widths}
    readers = {name: (layer.inputs, double.layers[name].inputs) for name, layer in channels.layers.items()}
    readers |= {f"{name} (norm)": (ids, double.norms[name]) for name, ids in channels.norms.items()}
    readers |= {
        name: (found.ids, double.tensors[name].ids if name in double.tensors else None)
        for name, found in channels.tensors.items()
    }
    for name, (before, after) in readers.items():
        if before is None:
            continue
        doubled = 2 * len(before) - np.isin(before // STRIDE, [FIXED, *channels.pinned]).sum()
        if after is None or len(after) != doubled:
            found |= dict.fromkeys(groups_of(before), f"{name} uses it after a reshape to a fixed shape")
    for number, group in channels.groups.items():
        twice = double.groups.get(number)
        if group.block and (twice is None or (twice.block, twice.parts) != (group.block, group.parts)):
            found[number] = "forward() uses a fixed number of heads, or ties its channels at fixed positions"
    for key, (ids, plain) in channels.scalars.items():
        if key in double.scalars and double.scalars[key][1] != plain:
            found |= dict.fromkeys(groups_of(ids), "forward() uses its number of channels in a computation")
    return {number: why for number, why in found.items() if not channels.groups[number].pinned}


def _with_multiples(channels: ChannelMap, double: ChannelMap) -> dict[int, ChannelGroup]:
    """Return the groups with what the width of each must be a multiple of."""
    found = {number: (group.block or 1) * group.parts for number, group in channels.groups.items()}
    for key, reshape in channels.reshapes.items():
        after = double.reshapes[key].sizes if key in double.reshapes else ()
        fixed = [size for size, new in zip(reshape.sizes, after, strict=False) if size is not None and size == new]
        for number in set(groups_of(reshape.ids)) - channels.pinned.keys():
            found[number] = math.lcm(found[number], *fixed)
    return {number: replace(group, multiple=found[number]) for number, group in channels.groups.items()}
