"""Compare an ONNX model with the torch model that it was exported from, every layer on its own.

Torch's integers are compared with ONNX Runtime's at every activation quantizer. Torch then continues with the latter's
values, so every layer gets the same input and no difference is counted twice.
"""

from contextlib import ExitStack
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from micronet.errors import FailedError
from micronet.models.device import as_arrays, call, head
from micronet.models.modes import eval_mode
from micronet.models.outputs import tensors_in
from micronet.onnx.moves import ADDED
from micronet.onnx.ops import QUANTIZE
from micronet.quantization.calibrate import each_quantizer
from micronet.quantization.functional import dequantize, to_integers
from micronet.runtimes.onnxruntime import exposing_session, run


def compare_layers(model: nn.Module, proto: onnx.ModelProto, images: Any) -> dict[str, int]:
    """Return the largest difference in steps between torch's and ONNX Runtime's integers, per activation quantizer.

    ``images``: a batch (N, C, H, W) float32. Raises FailedError if only the file has some quantizer.
    """
    return compare_inside(model, proto, images)[0]


@torch.no_grad()
def compare_inside(model: nn.Module, proto: onnx.ModelProto, images: Any) -> tuple[dict[str, int], float]:
    """Return what ``compare_layers`` does, and the error of the worst output if torch goes on with their integers."""
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    images = head(images, fixed) if fixed else images
    expected, theirs = _integers(proto, images)
    quantizers = {f"{name}.{slot}": quantizer for name, slot, quantizer in each_quantizer(model)}
    if extra := theirs.keys() - quantizers:
        raise FailedError(
            f"the exported model has quantizers that are not in the torch model: {', '.join(sorted(extra)[:5])}"
        )
    worst: dict[str, int] = {}
    with ExitStack() as hooks, eval_mode(model):
        for key, calls in theirs.items():
            hook = _comparison(key, calls, worst)
            hooks.enter_context(quantizers[key].register_forward_hook(hook, with_kwargs=True))
        outputs = tensors_in(call(model, images))
    for index, (ours, other) in enumerate(zip(outputs, expected, strict=True), 1):
        _check_same_size(f"output {index}", ours, other)
    errors = [
        float((torch.from_numpy(other) - ours).norm() / ours.norm().clamp(min=1e-30))
        for ours, other in zip(outputs, expected, strict=True)
        if ours.is_floating_point()
    ]
    return worst, max(errors, default=0.0)


def _comparison(key: str, calls: list[Any], worst: dict[str, int]) -> Any:
    """Make a hook that compares a quantizer's integers with ONNX Runtime's and passes on the latter's values.

    ``calls``: ONNX Runtime's integers in each call of the quantizer.
    """
    remaining = iter(calls)

    def hook(quantizer: Any, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor) -> Tensor:
        theirs = next(remaining)
        x = inputs[0].relu() if options.get("rectified") else inputs[0]
        qparams = quantizer.qparams(x)
        shifted = qparams.qmin < 0 and theirs.dtype.kind == "u"
        shift = 2 ** (theirs.dtype.itemsize * 8 - 1) if shifted else 0
        real = theirs[:, : x.shape[1]] if theirs.ndim == x.ndim > 1 else theirs  # the file may pad the channels
        _check_same_size(key, x, real)
        other = torch.from_numpy(real.astype(np.float32)).view_as(x) - shift  # or flatten first
        worst[key] = max(worst.get(key, 0), int((to_integers(x, qparams) - other).abs().max()))
        return dequantize(other, qparams)

    return hook


def _check_same_size(name: str, ours: Tensor, theirs: Any) -> None:
    """Raise FailedError if a file computes more or fewer values than torch, as behind a choice of boxes by scores."""
    if ours.numel() != theirs.size:
        raise FailedError(
            f"{name} has the shape {tuple(ours.shape)} in torch and {tuple(theirs.shape)} in the exported model, as "
            "forward() selects values by their size, and rounding decides which; return what comes before the "
            "selection; nothing was written"
        )


def _is_added(node: onnx.NodeProto) -> bool:
    return any(entry.key == ADDED for entry in node.metadata_props)


def _integers(proto: onnx.ModelProto, images: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the outputs, and the integers of every quantizer: ``module.slot`` -> an array for each call."""
    nodes = [node for node in proto.graph.node if node.op_type == QUANTIZE and not _is_added(node)]
    session = exposing_session(proto, [node.output[0] for node in nodes])
    arrays, first = run(session, as_arrays(images)), len(proto.graph.output)
    calls: dict[str, list[Any]] = {}
    for node, array in zip(nodes, arrays[first:], strict=True):
        calls.setdefault(node.name.partition(f".{QUANTIZE}")[0], []).append(array)
    return arrays[:first], calls
