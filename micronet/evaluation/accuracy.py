"""Measure the accuracy and agreement of any predictor, images (N, C, H, W) float32 -> scores (N, K) float32.

A torch model, an ONNX Runtime session, a packed network and a TensorRT engine all are predictors.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.errors import MicronetError, first_line
from micronet.evaluation.network import Predictor, Scores
from micronet.models.device import inference_format, place_input
from micronet.models.modes import eval_mode

_NO_SCORES = "the network must return class scores of shape (N, classes), one row per image"


class Evaluation(NamedTuple):
    """The class predicted for each image, the number of correct ones, and the sum of all cross-entropies in nats."""

    classes: NDArray[np.int64]
    correct: int
    total_loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct classes, 0..1."""
        return self.correct / len(self.classes)

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.total_loss / len(self.classes)


def predictor(model: nn.Module) -> Predictor:
    """Return a predictor that runs a torch model, in its present mode and on its device."""
    device, layout = next(model.parameters()).device, inference_format(model)

    @torch.inference_mode()
    def predict(images: NDArray[np.float32]) -> Scores:
        scores = model(place_input(torch.from_numpy(images), device, layout))
        if not isinstance(scores, Tensor):
            raise MicronetError(f"{_NO_SCORES}; got a {type(scores).__name__}")
        out: Scores = scores.float().cpu().numpy()
        return out

    return predict


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Predictor]:
    """Give a predictor for a model, which is in eval mode inside this context."""
    with eval_mode(model):
        yield predictor(model)


def check_scores(predict: Predictor, images: Tensor, classes: int, name: str = "the network") -> None:
    """Raise MicronetError if a predictor refuses images, or does not score the data set's number of classes.

    ``images``: (N, C, H, W) float32; one is enough. ``name``: what error messages call the network.
    """
    try:
        scores = predict(images.numpy())
    except MicronetError:
        raise
    except Exception as error:  # a network's forward may raise anything
        shape = tuple(images.shape[1:])
        raise MicronetError(f"{name} does not accept images of shape {shape}: {first_line(error)}") from error
    if scores.ndim != 2:
        raise MicronetError(f"{_NO_SCORES}; got shape {scores.shape}")
    if scores.shape[1] != classes:
        raise MicronetError(
            f"{name} outputs scores for {scores.shape[1]} classes, but the data set has {classes}; rebuild it with "
            f"""{classes} classes, for example with micronet import --model-args '{{"num_classes": {classes}}}'"""
        )


def evaluate(
    predict: Predictor, batches: Iterable[tuple[Tensor, Tensor]], on_batch: Callable[[int], None] | None = None
) -> Evaluation:
    """Run a predictor over batches of images (N, C, H, W) float32 and labels (N,) int64.

    ``on_batch`` is called after every batch with the number of images evaluated so far.
    """
    classes = [np.empty(0, np.int64)]
    correct, loss, images = 0, 0.0, 0
    for inputs, labels in batches:
        scores = torch.from_numpy(predict(inputs.numpy()))
        best = scores.argmax(1)
        classes.append(best.numpy())
        correct += int((best == labels).sum())
        loss += float(F.cross_entropy(scores.double(), labels, reduction="sum"))
        images += len(labels)
        if on_batch is not None:
            on_batch(images)
    return Evaluation(np.concatenate(classes), correct, loss)


def agreement(left: Evaluation, right: Evaluation) -> float:
    """Return the share of images for which two evaluations of the same data predict the same class."""
    return float((left.classes == right.classes).mean())
