"""Compare an ONNX model's outputs with those of the torch model that it was exported from."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from micronet.artifact.header import StageRecord
from micronet.errors import FailedError, count, first_line
from micronet.evaluation.network import Predictor
from micronet.models.device import Inputs, as_arrays, batch_length, call
from micronet.models.finite import check_outputs
from micronet.models.modes import eval_mode
from micronet.models.outputs import tensors_in
from micronet.onnx.layer_agreement import compare_inside
from micronet.quantization.calibrate import each_quantizer
from micronet.quantization.layers import ACTIVATION_SLOTS
from micronet.quantization.schemes.wbwtab import SignQuantizer
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, run

MOST_CHANGED = 0.01  # share of images in another class, near ties apart
# Two scores that are closer than this share of their image's standard deviation are a near tie. A class only changes
# if its lead is at most twice the difference between the runtimes' scores, so a lead this small says that the scores
# meet about the limit that LARGEST_ROUNDED_ERROR sets for other outputs, and that rounding alone decides the class.
NEAR_TIE = 0.1
LARGEST_FLOAT_ERROR = {TensorProto.FLOAT: 1e-3, TensorProto.FLOAT16: 2e-2}  # relative score error, by weight type
LARGEST_ROUNDED_ERROR = 0.1  # for a rounding network whose outputs are not class scores: an SQNR of 20 dB
USUAL_ERROR = 0.01  # relative score error; a larger one means that many steps flipped
# Of a step, up to which values are moved before they are rounded, to see how much a network amplifies roundings that go
# the other way. Runtimes move them about as far: they round biases to int32, and sums of floats in another order.
MOVED = 2.0**-8
INTEGER_BITS = 8  # float32 sums do not resolve wider grids, so a difference of one step means nothing there


class Agreement(NamedTuple):
    """How closely two runtimes agree."""

    classes: float  # share of images put into the same class
    error: float  # ||theirs - torch's|| / ||torch's - their mean|| over all scores, the mean taken per image
    images: int
    changed: int = 0  # images put into another class by more than a near tie
    unstable: int = 0  # those that torch itself changes if values move by MOVED, where more than MOST_CHANGED changed


@torch.no_grad()
def compare_outputs(
    model: nn.Module, proto: onnx.ModelProto, batches: Sequence[Any], *, classes: bool = True
) -> Agreement:
    """Run torch and ONNX Runtime on the same batches, (N, ...) float32, or ``Inputs``.

    If the outputs are not class scores (``classes``), or the network does not return one row of them per sample, the
    share of equal classes is NaN, and the error is computed as in ``compare_tensors``.
    """
    session = open_session(proto.SerializeToString(), RuntimeOptions(), "the exported model")
    with eval_mode(model):
        out = call(model, batches[0])
    if isinstance(out, Tensor) and out.dim() == 2 and classes:
        return compare_scores(model, lambda images: run(session, images)[0], batches)
    return compare_tensors(model, lambda inputs: run(session, inputs), batches)


@torch.no_grad()
def compare_tensors(model: nn.Module, predict: Predictor, batches: Sequence[Any]) -> Agreement:
    """Run torch and another runtime of the same network on the same batches; outputs may mean anything.

    The error is ||theirs - torch's|| / ||torch's|| over all output tensors.
    """
    difference = size = 0.0
    with eval_mode(model):
        for batch in batches:
            found = predict(as_arrays(batch))
            outputs = found if isinstance(found, list) else [found]
            check_outputs([torch.from_numpy(np.asarray(each)) for each in outputs], "the converted network")
            for ours, theirs in zip(tensors_in(call(model, batch)), outputs, strict=True):
                difference += float(np.square(ours.double().numpy() - theirs).sum())
                size += float(ours.double().square().sum())
    return Agreement(float("nan"), (difference / max(size, 1e-30)) ** 0.5, sum(map(batch_length, batches)))


def compare_scores(model: nn.Module, predict: Predictor, batches: Sequence[Tensor]) -> Agreement:
    """Run torch and another runtime of the same network on the same batches of images, (N, C, H, W) float32."""
    found = _compare_scores(model, predict, batches)
    if found.changed <= MOST_CHANGED * found.images:
        return found
    generator = torch.Generator().manual_seed(0)

    def predict_moved(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with _moved_values(model, generator):
            scores: NDArray[np.float32] = tensors_in(model(torch.from_numpy(images)))[0].numpy()
        return scores

    return found._replace(unstable=_compare_scores(model, predict_moved, batches).changed)


@contextmanager
def _moved_values(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Move what activation quantizers round by a random part of their step, at most MOVED."""

    def move(quantizer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        moves = (2 * torch.rand(x.shape, generator=generator) - 1).to(x)
        return x + quantizer.qparams(x).scale * MOVED * moves, *inputs[1:]

    with ExitStack() as hooks:
        for _, slot, quantizer in each_quantizer(model):
            if slot in ACTIVATION_SLOTS and not isinstance(quantizer, SignQuantizer):
                hooks.enter_context(quantizer.register_forward_pre_hook(move))
        yield


@torch.no_grad()
def _compare_scores(model: nn.Module, predict: Predictor, batches: Iterable[Tensor]) -> Agreement:
    same, changed, images, difference, spread = 0, 0, 0, 0.0, 0.0
    with eval_mode(model):
        for batch in batches:
            ours = tensors_in(model(batch))[0].double().numpy()
            theirs = predict(batch.numpy()).astype(np.float64)
            check_outputs(torch.from_numpy(theirs), "the converted network")
            agree = ours.argmax(1) == theirs.argmax(1)
            same += int(agree.sum())
            changed += int((~agree & ~_near_ties(ours)).sum())
            images += len(batch)
            difference += float(np.square(ours - theirs).sum())
            spread += float(np.square(ours - ours.mean(1, keepdims=True)).sum())
    return Agreement(same / images, (difference / max(spread, 1e-30)) ** 0.5, images, changed)


def _near_ties(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (N,), True where the two best of an image's scores (N, K) are a near tie."""
    best = np.sort(scores, 1)[:, -2:]
    near: NDArray[np.bool_] = best[:, -1] - best[:, 0] <= NEAR_TIE * scores.std(1)
    return near


def require_classes(agreement: Agreement, name: str) -> None:
    """Raise FailedError, which calls the other runtime's network ``name``, if too many classes differ.

    That is, more than MOST_CHANGED and than those that torch itself changes, a count that varies by its square root.
    """
    unstable = agreement.unstable + 3 * agreement.unstable**0.5
    if agreement.changed > MOST_CHANGED * agreement.images + unstable:
        raise FailedError(
            f"{name} and torch predict different classes for {agreement.changed} of "
            f"{count(agreement.images, 'image')}, near ties not counted (relative score error {agreement.error:.2%}); "
            "nothing was written"
        )


def compare_network(model: nn.Module, predict: Predictor, batches: Sequence[Any], *, classes: bool) -> Agreement:
    """Run torch and another runtime of the same network on the same batches; ``classes``: of images, for scores."""
    return (compare_scores if classes else compare_tensors)(model, predict, batches)


def require_close(found: Agreement, name: str, *, rounds: bool, classes: bool, fp16: bool = False) -> None:
    """Raise FailedError, which calls the other runtime's network ``name``, if it does not compute what torch computes.

    Args:
        found: What ``compare_network`` measured.
        rounds: Whether the network is quantized.
        classes: Whether the outputs are class scores.
        fp16: Whether float weights are stored in fp16.
    """
    if not rounds and found.error > LARGEST_FLOAT_ERROR[TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT]:
        raise FailedError(f"the scores of {name} and torch differ by {found.error:.2%}; nothing was written")
    if not classes and found.error > LARGEST_ROUNDED_ERROR:
        raise FailedError(
            f"the outputs of {name} and torch differ by {found.error:.2%}; the limit is "
            f"{LARGEST_ROUNDED_ERROR:.0%}; nothing was written"
        )
    require_classes(found, name)


def require_agreement(model: nn.Module, proto: onnx.ModelProto, images: Any, agreement: Agreement) -> None:
    """Raise FailedError if an exported model does not compute what the torch model computes.

    That is, if too many classes differ, a float network's scores are off, or a layer is more than one step off.

    Args:
        images: A batch (N, C, H, W) float32 for the layer-by-layer check.
        agreement: What ``compare_outputs`` measured.
    """
    bits = [quantizer.bits for _, _, quantizer in each_quantizer(model)]
    types = {tensor.data_type for tensor in proto.graph.initializer} & LARGEST_FLOAT_ERROR.keys()
    limit = max((LARGEST_FLOAT_ERROR[each] for each in types), default=LARGEST_FLOAT_ERROR[TensorProto.FLOAT])
    if not bits and agreement.error > limit:
        raise FailedError(
            f"the scores of the exported model and torch differ by {agreement.error:.2%}; the limit is {limit:.1%}; "
            "nothing was written"
        )
    if max(bits, default=0) <= INTEGER_BITS:
        steps, error = compare_inside(model, proto, images)
        wrong = [f"{name} ({largest})" for name, largest in steps.items() if largest > 1]
        if wrong:
            raise FailedError(
                "the quantized outputs of the exported model and torch differ by more than one quantization step in "
                f"{', '.join(wrong)}; nothing was written"
            )
        if error > LARGEST_ROUNDED_ERROR:
            raise FailedError(
                f"the outputs of the exported model and torch differ by {error:.2%} from the same integers, so a part "
                "in float is computed differently; nothing was written"
            )
    require_classes(agreement, "the exported model")


@torch.no_grad()
def require_other_sizes(model: nn.Module, proto: onnx.ModelProto, inputs: Inputs) -> None:
    """Raise FailedError if a file with free sizes does not compute for others what torch computes.

    Tried are half and twice the sizes and one more, an odd size beside even ones, unless the network refuses them, or
    gives NaN or infinity for them.
    """
    session = open_session(proto.SerializeToString(), RuntimeOptions(), "the exported model")
    rounds = any(True for _ in each_quantizer(model))
    limit = LARGEST_ROUNDED_ERROR if rounds else LARGEST_FLOAT_ERROR[TensorProto.FLOAT16]
    shapes = [entry.type.tensor_type.shape.dim for entry in proto.graph.input]
    axes = [[axis for axis, dim in enumerate(shape) if axis and dim.dim_param] for shape in shapes]
    for resize in (lambda size: max(1, size // 2), lambda size: 2 * size, lambda size: size + 1):
        given = Inputs(_resized(x[:2], own, resize) for x, own in zip(inputs, axes, strict=True))
        try:
            with eval_mode(model):
                check_outputs(tensors_in(model(*given)), "the network")
        except Exception:  # a user's forward may raise anything
            continue
        try:
            error = compare_tensors(model, lambda arrays: run(session, arrays), [given]).error
            reason = f"differs by {error:.2%} from torch"
        except Exception as failure:  # whatever the runtime raises, or outputs of another shape
            error, reason = math.inf, f"fails ({first_line(failure)})"
        if not error <= limit:
            sizes = " and ".join("x".join(map(str, x.shape[1:])) for x in given)
            raise FailedError(
                f"the exported model {reason} for inputs of {sizes}, so a size may be fixed in it; nothing was "
                "written; pass --dynamic batch"
            )


def _resized(x: Tensor, axes: Collection[int], resize: Callable[[int], int]) -> Tensor:
    """Return a tensor that is longer or shorter along some axes, with its values repeated."""
    for axis in axes:
        x = x.index_select(axis, torch.arange(resize(x.size(axis))) % x.size(axis))
    return x


def drift(agreement: Agreement, history: Iterable[StageRecord]) -> str | None:
    """Return a warning if the scores are off although every layer agrees, or None.

    This happens with every scheme: a bias that is rounded only in the file moves some values to the next step, and
    with few bits a step is large.
    """
    if agreement.error <= USUAL_ERROR:
        return None
    cure = "to measure what that costs, run micronet compare on the artifact and the exported file"
    if all(record.stage != "bn-fuse" for record in history):
        cure = "run micronet bn-fuse first, so that torch rounds the biases exactly as the exported model does"
    return (
        f"the scores differ from torch's by {agreement.error:.2%}: every layer agrees to within one quantization "
        f"step, but the rounding differences add up; {cure}"
    )
