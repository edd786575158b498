"""Scores by the L1 norm of a channel's weights (Li et al. 2017, arXiv:1608.08710, section 3.1)."""

from torch import nn

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Penalty, Scores
from micronet.pruning.criteria.weights import WHY_UNSCORED, penalize_rows, score_rows

__all__ = ["WHY_UNSCORED", "penalty", "scores"]


def scores(model: nn.Module, channels: ChannelMap) -> Scores:
    """Return the scores of every group."""
    return score_rows(model, channels, lambda rows: rows.abs().sum(1))


def penalty(model: nn.Module, channels: ChannelMap, s: float) -> Penalty:
    """Return the L1 penalty, which adds ``s * sign(w)`` to the gradients."""
    return penalize_rows(model, channels, s, lambda rows: rows.sign())
