"""Measure any predictor by its task's loss and metrics, and the agreement of two.

A torch model, an ONNX Runtime session, a packed network and a TensorRT engine all are predictors.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError, count, first_line
from micronet.evaluation.network import Predictor, Scores
from micronet.graph.user_lines import error_line
from micronet.models.device import batch_length, inference_format, is_about_format, place_input, use_contiguous
from micronet.models.finite import check_outputs
from micronet.models.modes import eval_mode
from micronet.tasks.classification import DEFAULT_TASK, Classification
from micronet.tasks.task import Meter, Outputs, Task, describe, first_output, outputs_of


@dataclass(frozen=True)
class Evaluation:
    """What was measured over a number of samples: the task's meter, and the sum of all losses."""

    meter: Meter
    samples: int
    total_loss: float

    @property
    def metrics(self) -> dict[str, float]:
        """The task's metrics."""
        return self.meter.compute()

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.total_loss / self.samples

    @property
    def accuracy(self) -> float:
        """The share of correct classes, 0..1, in classification."""
        return self.metrics["accuracy"]

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class predicted for each image, in classification."""
        found: NDArray[np.int64] = self.meter.classes  # type: ignore[attr-defined]
        return found


def predictor(model: nn.Module) -> Predictor:
    """Return a predictor that runs a torch model, in its present mode and on its device."""
    device, layout = next((p.device for p in model.parameters()), torch.device("cpu")), inference_format(model)

    @torch.inference_mode()
    def run(arrays: tuple[NDArray[Any], ...]) -> Any:
        return outputs_of(model(*(place_input(torch.from_numpy(each), device, layout) for each in arrays)))

    def predict(inputs: Any) -> Scores:
        nonlocal layout
        arrays = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            outputs = run(arrays)
        except RuntimeError as error:
            if layout is torch.contiguous_format or not is_about_format(error):
                raise
            use_contiguous(model)
            layout = torch.contiguous_format
            outputs = run(arrays)
        if isinstance(outputs, Tensor):
            return _array(outputs)
        return [_array(each) for each in outputs]

    return predict


def _array(output: Tensor) -> NDArray[Any]:
    output = output.detach()  # a forward may ask for gradients of what it returns
    found: NDArray[Any] = (output.float() if output.is_floating_point() else output).cpu().contiguous().numpy()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Predictor]:
    """Give a predictor for a model, which is in eval mode inside this context."""
    with eval_mode(model):
        yield predictor(model)


def check_scores(
    predict: Predictor, inputs: Any, spec: DataSpec, name: str = "the network", task: Task = DEFAULT_TASK
) -> None:
    """Raise MicronetError if a predictor refuses inputs, or its outputs do not suit the task.

    ``inputs``: a batch, of which one sample is enough. ``name``: what error messages call the network.
    """
    try:
        outputs = run_batch(predict, inputs)
    except MicronetError:
        raise
    except Exception as error:  # a network's forward may raise anything
        if spec.inputs is None and isinstance(inputs, Tensor):
            given = f"images of shape {tuple(inputs.shape[1:])}"
        else:
            given = f"{'inputs' if isinstance(inputs, tuple) else 'the input'} {describe(inputs)}"
        raise MicronetError(f"{name} does not accept {given}{error_line(error)}: {reason_of(error)}") from error
    task.check(outputs, spec, name)
    if isinstance(task, Classification) and (rows := len(first_output(outputs))) != batch_length(inputs):
        raise MicronetError(
            f"{name} returns {count(rows, 'row')} of scores for {count(batch_length(inputs), 'image')}; expected one "
            "row per image; export the network with a variable batch size"
        )


def reason_of(error: Exception) -> str:
    """Return why a network refuses inputs, with the way on if its weights may have another precision than data."""
    reason = first_line(error)
    if found := re.search(r"\b(Half|BFloat16|Double)\b", reason):
        reason += (
            f"; data are read as float32, so if its weights are {found[1]}, convert them where it is built: return "
            "net.float()"
        )
    return reason


def run_batch(predict: Predictor, inputs: Any) -> Outputs:
    """Run a predictor on a batch of tensors on any device, and return its outputs as tensors on the CPU.

    Networks that draw random numbers in eval mode draw the same ones each time, so that they can be compared.

    Raises FailedError if the outputs hold NaN or infinity.
    """
    arrays = tuple(x.cpu().numpy() for x in inputs) if isinstance(inputs, tuple) else inputs.cpu().numpy()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        found = predict(arrays)
    outputs: Outputs = (
        torch.from_numpy(found)
        if not isinstance(found, list)
        else [torch.from_numpy(np.asarray(each)) for each in found]
    )
    check_outputs(outputs)
    return outputs


def evaluate(
    predict: Predictor,
    batches: Iterable[tuple[Any, Any]],
    on_batch: Callable[[int], None] | None = None,
    task: Task = DEFAULT_TASK,
) -> Evaluation:
    """Run a predictor over batches of inputs and targets: images (N, C, H, W) float32 and labels (N,) int64.

    ``on_batch`` is called after every batch with the number of samples evaluated so far.
    """
    meter, loss, samples = task.meter(), 0.0, 0
    for inputs, targets in batches:
        outputs = run_batch(predict, inputs)
        count = batch_length(inputs)
        meter.update(outputs, targets)
        precise = tree_map_only(Tensor, Tensor.double, outputs) if task.has_classes else outputs
        loss += float(task.loss(precise, targets)) * count
        samples += count
        if on_batch is not None:
            on_batch(samples)
    return Evaluation(meter, samples, loss)


def agreement(left: Evaluation, right: Evaluation) -> float:
    """Return the share of images for which two evaluations of the same data predict the same class."""
    return float((left.classes == right.classes).mean())
