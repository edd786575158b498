"""A network's metrics on a split of a data set, by all processes together."""

from collections.abc import Callable

import torch
from torch import nn

from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.split import Split
from micronet.evaluation.accuracy import evaluate, evaluating
from micronet.evaluation.network import Predictor
from micronet.training import distributed


def validate(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Return a network's metrics and mean loss on the validation images; names begin with ``validation_``."""
    with evaluating(model) as predict:
        return prefixed("validation", evaluate_distributed(predict, data, data.validation))


def evaluate_distributed(
    predict: Predictor, data: Dataset, split: Split, on_batch: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Return a predictor's metrics and mean loss on a split of a data set; each rank computes some of the batches.

    The batches, and thus the results, are those of a single process. If a task's metrics are not made of sums
    (``totals``), every rank computes all batches. ``on_batch`` is called after each batch with the number of samples
    that this rank has seen.
    """
    shares = hasattr(data.task.meter(), "totals")
    own_batches = slice(distributed.rank(), None, distributed.world_size()) if shares else slice(None)
    own = evaluate(predict, data.referenced(eval_batches(split, data.spec, only=own_batches)), on_batch, data.task)
    loss, meter = own.total_loss, own.meter
    if shares:
        meter.totals = distributed.add_up_parts(meter.totals)  # type: ignore[attr-defined]
        loss = float(distributed.sum_over_ranks(torch.tensor(loss, dtype=torch.float64)))
    return {**meter.compute(), "loss": loss / len(split)}


def prefixed(part: str, metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics by names that begin with a part of the data: ``validation_accuracy``."""
    return {f"{part}_{name}": value for name, value in metrics.items()}
