"""Scores by a first-order estimate of how the loss changes without a channel.

This is (sum of weight times gradient)^2 over a channel's weights (Molchanov et al. 2019, arXiv:1906.10771, equation 8).
The gradients are those stored in the parameters: call backward on the loss of some batches first. The paper squares the
sum for each batch and averages; here the accumulated gradient is squared once.
"""

from functools import partial

from micronet.pruning.criteria.weights import WHY_UNSCORED, score_rows

__all__ = ["WHY_UNSCORED", "scores"]

scores = partial(score_rows, score=lambda rows: rows.sum(1).square(), of_gradients=True)
