"""Accuracy, agreement and latency of any predictor: a callable, images (N, C, H, W) float32 -> scores (N, K) float32.

A torch model, an ONNX Runtime session, a packed network and a TensorRT engine are all that, so these exist once.
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

_NO_SCORES = "the network does not return one row of class scores an image, (N, classes)"


class Evaluation(NamedTuple):
    """``accuracy`` 0..1, mean cross-entropy ``loss`` in nats, number of ``images``, and the class given to each."""

    accuracy: float
    loss: float
    images: int
    classes: NDArray[np.int64]


def predictor(model: nn.Module) -> Predictor:
    """Return the predictor that runs a torch model, in the mode it is in, on the device it is on."""
    device, layout = next(model.parameters()).device, inference_format(model)

    @torch.inference_mode()
    def predict(images: NDArray[np.float32]) -> Scores:
        scores = model(place_input(torch.from_numpy(images), device, layout))
        if not isinstance(scores, Tensor):
            raise MicronetError(f"{_NO_SCORES}; it returns a {type(scores).__name__}")
        out: Scores = scores.float().cpu().numpy()
        return out

    return predict


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Predictor]:
    """Give the predictor over a model in eval mode; the mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        yield predictor(model)
    finally:
        model.train(training)


def check_scores(predict: Predictor, images: Tensor, classes: int, name: str = "the network") -> None:
    """Raise MicronetError where images do not go through a predictor, or it does not score ``classes`` classes."""
    try:
        scores = predict(images.numpy())
    except MicronetError:
        raise
    except Exception as error:  # a network's forward may refuse its input with anything
        shape = tuple(images.shape[1:])
        raise MicronetError(f"images of shape {shape} do not fit {name}: {first_line(error)}") from error
    if scores.ndim != 2:
        raise MicronetError(f"{_NO_SCORES}; its shape is {scores.shape}")
    if scores.shape[1] != classes:
        raise MicronetError(
            f"{name} scores {scores.shape[1]} classes, the data have {classes}; make it with as many, for example "
            f"""micronet import --model-args '{{"num_classes": {classes}}}'"""
        )


def evaluate(
    predict: Predictor, batches: Iterable[tuple[Tensor, Tensor]], on_batch: Callable[[int], None] | None = None
) -> Evaluation:
    """Run a predictor over (images, labels) batches; ``on_batch`` hears of the images done so far."""
    correct, loss, classes = tally(predict, batches, on_batch)
    if not classes:
        raise ValueError("no images to evaluate on")
    given = np.concatenate(classes)
    return Evaluation(correct / len(given), loss / len(given), len(given), given)


def tally(
    predict: Predictor, batches: Iterable[tuple[Tensor, Tensor]], on_batch: Callable[[int], None] | None
) -> tuple[float, float, list[NDArray[np.int64]]]:
    """Return how many images are classified rightly, the sum of their losses, and the classes given, batch by batch."""
    classes: list[NDArray[np.int64]] = []
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
    return correct, loss, classes


def agreement(left: Evaluation, right: Evaluation) -> float:
    """Return the share of images that two evaluations of the same data put into the same class."""
    return float((left.classes == right.classes).mean())
