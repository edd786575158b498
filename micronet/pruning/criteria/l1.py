"""Channels judged by the sum of their weights' magnitudes (Li et al. 2017, arXiv:1608.08710, section 3.1)."""

from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Penalty, Scores, judge, push
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "penalty", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group; higher is worth more."""
    return judge(model, flow, lambda rows: rows.abs().sum(1))


def penalty(model: nn.Module, flow: Flow, s: float) -> Penalty:
    """Return the function that adds the L1 penalty's subgradient, ``s * sign(w)``, before an optimizer's step."""
    return push(model, flow, s, lambda rows: rows.sign())
