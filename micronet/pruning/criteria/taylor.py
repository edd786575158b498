"""Channels judged by what the loss would change without them, to first order.

Molchanov et al. 2019, arXiv:1906.10771, equation 8: (sum of weight times gradient)^2 over a channel's weights. The
gradients are those that the parameters hold: run a loss backward on some batches first. Deviation: the paper squares
each batch's and averages; here the gradient of all the batches together is squared once.
"""

from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Scores, judge
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group; higher is worth more. Raises MicronetError without gradients."""
    return judge(model, flow, lambda rows: rows.sum(1).square(), of_gradients=True)
