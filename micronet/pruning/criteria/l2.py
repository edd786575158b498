"""Scores by the L2 norm of a channel's weights (He et al. 2018, arXiv:1808.06866, equation 2)."""

from functools import partial

from torch import Tensor

from micronet.pruning.criteria.weights import WHY_UNSCORED, penalize_rows, score_rows

__all__ = ["WHY_UNSCORED", "penalty", "scores"]


def _group_lasso(rows: Tensor) -> Tensor:
    """Return sqrt(n) * w / |w| for n weights a row; sqrt(n) makes all sizes comparable (Yuan & Lin 2006, section 2)."""
    slope: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * len(rows[0]) ** 0.5
    return slope


scores = partial(score_rows, score=lambda rows: rows.norm(dim=1))
penalty = partial(penalize_rows, subgradient=_group_lasso)
