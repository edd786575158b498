"""Scores by the L2 norm of a channel's weights (He et al. 2018, arXiv:1808.06866, equation 2)."""

from torch import nn

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Penalty, Scores
from micronet.pruning.criteria.weights import WHY_UNSCORED, penalize_rows, score_rows

__all__ = ["WHY_UNSCORED", "penalty", "scores"]


def scores(model: nn.Module, channels: ChannelMap) -> Scores:
    """Return the scores of every group."""
    return score_rows(model, channels, lambda rows: rows.norm(dim=1))


def penalty(model: nn.Module, channels: ChannelMap, s: float) -> Penalty:
    """Return the group lasso, which adds ``s * sqrt(n) * w / |w|`` for a channel of n weights to the gradients.

    The factor sqrt(n) makes groups of different sizes comparable (Yuan & Lin 2006, section 2).
    """
    return penalize_rows(
        model, channels, s, lambda rows: rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * len(rows[0]) ** 0.5
    )
