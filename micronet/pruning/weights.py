"""Weights that a network computes, as pruning needs them: stored where channels may be cut, and computed elsewhere."""

from typing import Any

import numpy as np
from torch import nn

from micronet.errors import MicronetError
from micronet.graph.plain import made_name
from micronet.graph.plain_weights import COMPUTED, with_plain_weights
from micronet.models.device import Example
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.groups import find_groups_and_heads
from micronet.pruning.ids import groups_of


def with_weights_to_cut(model: nn.Module, example: Example) -> tuple[nn.Module, dict[str, Any]]:
    """Return what ``with_plain_weights`` does, but a layer that stays whole goes on computing its weight.

    So a later training still normalizes the class centers of a face recognizer, for example.

    Args:
        model: The network.
        example: An input.
    """
    stored, result = with_plain_weights(model, example, "pruning")
    channels = _find_channels(stored, example) if result.get(COMPUTED) else None
    kept = [] if channels is None else [name for name in result[COMPUTED] if _stays_whole(name, channels)]
    if channels is None or not kept:
        return stored, result
    other, record = with_plain_weights(model, example, "pruning", kept)
    now = _find_channels(other, example)
    is_same = now is not None and _free_widths(now) == _free_widths(channels)
    return (other, record) if is_same else (stored, result)


def _find_channels(model: nn.Module, example: Example) -> ChannelMap | None:
    try:
        return find_groups_and_heads(model, example)
    except MicronetError:  # which pruning will raise again
        return None


def _stays_whole(weight: str, channels: ChannelMap) -> bool:
    """Return True if no channel of the layers that use a weight can be cut."""
    names = {weight.rpartition(".")[0], made_name(weight)} & channels.layers.keys()
    ends = [ids for name in names for ids in channels.layers[name].ends]
    return bool(ends) and channels.pinned.keys() >= set(groups_of(np.concatenate(ends)))


def _free_widths(channels: ChannelMap) -> list[int]:
    return [group.width for group in channels.groups.values() if not group.pinned]
