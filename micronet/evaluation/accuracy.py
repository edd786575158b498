"""Accuracy, agreement and latency of any predictor: a callable, images (N, C, H, W) float32 -> scores (N, K) float32.

A torch model, an ONNX Runtime session, a packed network and a TensorRT engine are all that, so these exist once.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.data.batches import plain_batches
from micronet.data.dataset import DataSpec
from micronet.data.split import Split
from micronet.errors import MicronetError, first_line
from micronet.training import distributed

Scores = NDArray[np.float32]
Predictor = Callable[[NDArray[np.float32]], Scores]

WARM_UP_SECONDS = 0.3
MEASURE_SECONDS = 1.5  # a predictor and batch size
FEWEST_ROUNDS = 5
_NO_SCORES = "the network does not return one row of class scores an image, (N, classes)"


class Evaluation(NamedTuple):
    """``accuracy`` 0..1, mean cross-entropy ``loss`` in nats, number of ``images``, and the class given to each."""

    accuracy: float
    loss: float
    images: int
    classes: NDArray[np.int64]


class Latency(NamedTuple):
    """Milliseconds a call, over single calls: median and 95th percentile."""

    p50_ms: float
    p95_ms: float


def predictor(model: nn.Module) -> Predictor:
    """Return the predictor that runs a torch model, in the mode it is in, on the device it is on."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def predict(images: NDArray[np.float32]) -> Scores:
        scores = model(torch.from_numpy(images).to(device, memory_format=torch.channels_last))
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
    correct, loss, classes = _tally(predict, batches, on_batch)
    if not classes:
        raise ValueError("no images to evaluate on")
    given = np.concatenate(classes)
    return Evaluation(correct / len(given), loss / len(given), len(given), given)


def evaluate_together(
    predict: Predictor, split: Split, spec: DataSpec, on_batch: Callable[[int], None] | None = None
) -> tuple[float, float]:
    """Return a predictor's accuracy and loss on a split, of whose batches each process does every so many.

    The batches are those that one process would do, and so are the numbers. ``on_batch`` hears of this process's.
    """
    correct, loss, _ = _tally(predict, plain_batches(split, spec, turns=distributed.my_turns()), on_batch)
    correct, loss = distributed.total(torch.tensor([correct, loss], dtype=torch.float64)).tolist()
    return correct / len(split), loss / len(split)


def _tally(
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


def latencies(predictors: Sequence[Predictor], inputs: Sequence[NDArray[np.float32]]) -> list[Latency]:
    """Time each predictor on its own input, in turns, so that a change of the machine's speed meets them all alike.

    Only the call is timed: no data loading, and warmed up first.
    """
    for predict, images in zip(predictors, inputs, strict=True):
        start = time.perf_counter()
        predict(images)
        while time.perf_counter() - start < WARM_UP_SECONDS:
            predict(images)
    samples: list[list[float]] = [[] for _ in predictors]
    spent = 0.0
    while spent < MEASURE_SECONDS * len(predictors) or len(samples[0]) < FEWEST_ROUNDS:
        for kept, predict, images in zip(samples, predictors, inputs, strict=True):
            start = time.perf_counter()
            predict(images)
            kept.append(time.perf_counter() - start)
            spent += kept[-1]
    return [Latency(*(1000 * np.percentile(kept, [50, 95])).tolist()) for kept in samples]


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of convolutions and linear layers, attention's own included, for one image."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.MultiheadAttention):  # its four projections are no layers of their own
            read = [*inputs[:3], *(named[name] for name in ("query", "key", "value") if name in named)]
            total += sum(x.numel() for x in (*read, output[0])) * module.embed_dim
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.modules.conv._ConvNd):
            positions = inputs[0] if module.transposed else output
            total += positions.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    training = model.training
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *image_shape, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total
