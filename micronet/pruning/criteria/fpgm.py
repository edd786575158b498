"""Scores by the total distance of a channel's weights to those of the other channels.

The other filters can replace one that lies near their geometric median (He et al. 2019, arXiv:1811.00250, equation 4).
"""

import torch
from torch import nn

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Scores
from micronet.pruning.criteria.weights import WHY_UNSCORED, score_rows

__all__ = ["WHY_UNSCORED", "scores"]


def scores(model: nn.Module, channels: ChannelMap) -> Scores:
    """Return the scores of every group."""
    return score_rows(model, channels, lambda rows: torch.cdist(rows, rows).sum(1))
