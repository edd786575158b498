"""Channels judged by how far their weights lie from the other channels', in all.

A filter near the geometric median of its layer's is one that the others can stand in for (He et al. 2019,
arXiv:1811.00250, equation 4).
"""

import torch
from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Scores, judge
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group; higher is worth more."""
    return judge(model, flow, lambda rows: torch.cdist(rows, rows).sum(1))
