"""Accuracy and loss on a split, shared by all processes of a training."""

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
    """Return a predictor's accuracy and loss on a split, of whose batches each process does every so many.

    The batches are those that one process would do, and so are the numbers. ``on_batch`` hears of this process's.
    """
    correct, loss, _ = tally(predict, eval_batches(split, spec, turns=distributed.own_batches()), on_batch)
    correct, loss = distributed.sum_over_ranks(torch.tensor([correct, loss], dtype=torch.float64)).tolist()
    return correct / len(split), loss / len(split)
