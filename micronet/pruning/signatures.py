"""Signatures of channels: which channels may take each other's place."""

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.ids import FIXED, STRIDE, Ids

Signature = tuple[tuple[str, int], ...]


def signatures(channels: ChannelMap) -> dict[int, list[Signature]]:
    """Return, for each channel of each group, the layers that read it and the part of a grouped layer it lies in.

    A channel may replace another one only if their signatures are equal.
    """
    found: dict[int, list[list[tuple[str, int]]]] = {
        number: [[] for _ in range(group.width)] for number, group in channels.groups.items()
    }

    def add(reader: str, ids: Ids, parts: int) -> None:
        size = len(ids) // parts
        for position, channel_id in enumerate(ids.tolist()):
            if channel_id != FIXED:
                group, channel = divmod(channel_id, STRIDE)
                found[group][channel].append((reader, position // size))

    for name, layer in channels.layers.items():
        parts = channels.parts(name)
        if layer.inputs is not None:
            add(f"{name} reads", layer.inputs, parts)
        if parts > 1:
            add(f"{name} writes", layer.outputs, parts)
    for name, ids in channels.norms.items():
        add(name, ids, 1)
    return {group: [tuple(sorted(places)) for places in found_in] for group, found_in in found.items()}
