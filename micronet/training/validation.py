"""Accuracy and loss on a split, computed by all ranks of a training."""

from collections.abc import Callable

import torch

from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.data.split import ImageSplit
from micronet.evaluation.accuracy import tally
from micronet.evaluation.network import Predictor
from micronet.training import distributed


def evaluate_distributed(
    predict: Predictor, split: ImageSplit, spec: DataSpec, on_batch: Callable[[int], None] | None = None
) -> tuple[float, float]:
    """Return a predictor's accuracy (0..1) and mean loss on a split; each rank computes its own batches.

    The batches, and thus the results, are those of a single process.

    Args:
        on_batch: Called after each batch with the number of images that this rank has seen.
    """
    correct, loss, _ = tally(predict, eval_batches(split, spec, only=distributed.own_batches()), on_batch)
    correct, loss = distributed.sum_over_ranks(torch.tensor([correct, loss], dtype=torch.float64)).tolist()
    return correct / len(split), loss / len(split)
