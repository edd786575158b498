"""Which groups of channels may have other widths at all, found by giving every one of them twice as many.

Where sizes are written down in a forward, or a layer's input no longer grows with the channels it reads, the groups
stay as they are. What did not grow along a split axis is the number of pieces a width must be a multiple of.
"""

import math

import numpy as np

from micronet.pruning.flow import Flow
from micronet.pruning.network import Network
from micronet.pruning.numbering import FIXED, STRIDE, Ids, groups_of


def follow(network: Network) -> Flow:
    """Return the flow of a network's channels, with all that cannot take other widths pinned, and the units found."""
    pinned: dict[int, str] = {}
    while True:
        flow = Flow(network, pinned=pinned)
        double = flow.with_widths(
            {group: width * (1 if group in flow.pinned else 2) for group, width in flow.widths.items()}
        )
        more = _stuck(flow, double)
        if not more:
            flow.units = _units(flow, double)
            return flow
        pinned |= more


def _stuck(flow: Flow, double: Flow) -> dict[int, str]:
    """Return the groups that are not pinned yet and do not bear twice the width, and why."""
    found = {flow.root(group): why for group, why in double.pinned.items() if group in flow.known}
    readers = {name: (layer.inputs, double.layers[name].inputs) for name, layer in flow.layers.items()}
    readers |= {f"{name} (norm)": (ids, double.norms[name]) for name, ids in flow.norms.items()}
    for name, (before, after) in readers.items():
        if before is not None and (after is None or len(after) != _grown(flow, before)):
            found |= dict.fromkeys(groups_of(before), f"{name} reads it after sizes that are written down")
    for group, size in flow.blocks.items():
        if double.blocks.get(group) != size:
            found[group] = "its forward has as many heads at any width"
    for key, (ids, plain) in flow.scalars.items():
        if key in double.scalars and double.scalars[key][1] != plain:
            found |= dict.fromkeys(groups_of(ids), "its forward computes with the number of channels")
    return {group: why for group, why in found.items() if group not in flow.pinned}


def _grown(flow: Flow, ids: Ids) -> int:
    """Return how many positions channels should take when the free ones are twice as many."""
    fixed = [FIXED, *flow.pinned]
    groups = np.where(ids == FIXED, FIXED, ids // STRIDE)
    return int(2 * len(ids) - np.isin(groups, fixed).sum())


def _units(flow: Flow, double: Flow) -> dict[int, int]:
    units = dict(flow.blocks)
    for ids, number in flow.grouped:
        for group in groups_of(ids):
            units[group] = math.lcm(units.get(group, 1), number)
    for key, move in flow.reshaped.items():
        grown = double.reshaped[key].sizes if key in double.reshaped else ()
        kept = [size for size, after in zip(move.sizes, grown, strict=False) if size is not None and size == after]
        for group in set(groups_of(move.ids)) - flow.pinned.keys():
            units[group] = math.lcm(units.get(group, 1), *kept)
    return units
