"""Channels judged by the Euclidean length of their weights (He et al. 2018, arXiv:1808.06866, equation 2)."""

from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Scores, judge
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group; higher is worth more."""
    return judge(model, flow, lambda rows: rows.norm(dim=1))
