"""Random scores, the same every time: the baseline for every other criterion."""

import numpy as np
from torch import nn

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Scores
from micronet.pruning.criteria.weights import WHY_UNSCORED

__all__ = ["WHY_UNSCORED", "scores"]


def scores(model: nn.Module, channels: ChannelMap) -> Scores:
    """Return the scores of every group."""
    generator = np.random.default_rng(0)
    return {number: generator.random(group.width) for number, group in channels.groups.items()}
