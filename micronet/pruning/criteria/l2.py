"""Channels judged by the Euclidean length of their weights (He et al. 2018, arXiv:1808.06866, equation 2)."""

from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Penalty, Scores, judge, push
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "penalty", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group; higher is worth more."""
    return judge(model, flow, lambda rows: rows.norm(dim=1))


def penalty(model: nn.Module, flow: Flow, s: float) -> Penalty:
    """Return the function that adds the group lasso's subgradient before an optimizer's step.

    That is ``s * sqrt(n) * w / |w|`` for a channel of n weights (the group lasso of Yuan & Lin 2006, whose
    sqrt(n) makes groups of other sizes compare).
    """
    return push(
        model, flow, s, lambda rows: rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * len(rows[0]) ** 0.5
    )
