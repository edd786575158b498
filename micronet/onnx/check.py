"""Does an ONNX file compute what the torch model computes? Whole, and layer by layer.

Layer by layer means: at every activation quantizer torch's integers are compared with ONNX Runtime's, then torch goes
on with ONNX Runtime's values. So each layer is judged on the same input and no difference is counted twice.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from micronet.artifact.history import StageRecord
from micronet.errors import FailedError
from micronet.evaluation.network import Predictor
from micronet.quantization.calibrate import each_quantizer
from micronet.quantization.functional import dequantize, quantize
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, run

LEAST_AGREEMENT = 0.99  # share of classes; a rounding that flips at a boundary may turn a close call
LARGEST_FLOAT_ERROR = {TensorProto.FLOAT: 1e-3, TensorProto.FLOAT16: 2e-2}  # of scores, by the kind of the weights
USUAL_ERROR = 0.01  # of the scores: what is more comes of many steps that flipped, as biases off the integers' grid do
INTEGER_BITS = 8  # float32 sums do not resolve wider grids, so single steps say nothing there


class Agreement(NamedTuple):
    """``classes``: share of images put into the same class. ``error``: norm of the difference of the scores over the
    norm of torch's scores about their mean. ``images``: how many."""

    classes: float
    error: float
    images: int


def compare_outputs(
    model: nn.Module, proto: onnx.ModelProto, batches: Iterable[Tensor], options: RuntimeOptions | None = None
) -> Agreement:
    """Run torch and ONNX Runtime on the same images (N, C, H, W)."""
    session = open_session(proto.SerializeToString(), options or RuntimeOptions(), "the exported model")
    return compare_scores(model, lambda images: run(session, images)[0], batches)


@torch.no_grad()
def compare_scores(model: nn.Module, predict: Predictor, batches: Iterable[Tensor]) -> Agreement:
    """Run torch and another runtime of the same network on the same images (N, C, H, W)."""
    same, images, difference, spread = 0, 0, 0.0, 0.0
    model = model.eval()
    for batch in batches:
        ours = model(batch).double().numpy()
        theirs = predict(batch.numpy()).astype(np.float64)
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        images += len(batch)
        difference += float(np.square(ours - theirs).sum())
        spread += float(np.square(ours - ours.mean(1, keepdims=True)).sum())
    return Agreement(same / images, (difference / max(spread, 1e-30)) ** 0.5, images)


def require_agreement(model: nn.Module, proto: onnx.ModelProto, images: Tensor, agreement: Agreement) -> None:
    """Raise FailedError where an exported model is not the torch model: other classes, or a layer that is off."""
    quantizers = [quantizer for _, _, quantizer in each_quantizer(model)]
    kinds = {tensor.data_type for tensor in proto.graph.initializer} & LARGEST_FLOAT_ERROR.keys()
    allowed = max((LARGEST_FLOAT_ERROR[kind] for kind in kinds), default=LARGEST_FLOAT_ERROR[TensorProto.FLOAT])
    if not quantizers and agreement.error > allowed:
        raise FailedError(f"the exported model's scores are {agreement.error:.2%} off torch's; nothing was written")
    if max((quantizer.bits for quantizer in quantizers), default=0) <= INTEGER_BITS:
        wrong = {name: steps for name, steps in compare_layers(model, proto, images).items() if steps > 1}
        if wrong:
            raise FailedError(f"the exported model is more than one step off torch in {wrong}; nothing was written")
    if agreement.classes < LEAST_AGREEMENT:
        raise FailedError(
            f"the exported model puts only {agreement.classes:.2%} of {agreement.images} images into torch's class "
            f"(relative score error {agreement.error:.2%}); nothing was written"
        )


def drift(agreement: Agreement, history: Iterable[StageRecord]) -> str | None:
    """Say what to do where an exported model agrees layer by layer, and its scores are off torch's all the same.

    So it is with every scheme: a bias that is rounded in the file alone turns values to the next step, and of few bits
    a step is large.
    """
    if agreement.error <= USUAL_ERROR:
        return None
    cure = "measure the file itself, with micronet evaluate"
    if all(record.stage != "bn-fuse" for record in history):
        cure = "run micronet bn-fuse first, which rounds torch's biases as the file's are"
    return f"the scores are {agreement.error:.2%} off torch's: single steps that flipped add up; {cure}"


@torch.no_grad()
def compare_layers(
    model: nn.Module, proto: onnx.ModelProto, images: Tensor, options: RuntimeOptions | None = None
) -> dict[str, int]:
    """Return, for each activation quantizer, the largest difference between torch's and ONNX Runtime's integers.

    ``model``: the quantized torch model the file was exported from.
    """
    theirs = _integers(proto, images, options or RuntimeOptions())
    known = {f"{name}.{slot}" for name, slot, _ in each_quantizer(model)}
    if strangers := theirs.keys() - known:
        raise FailedError(f"the exported model has quantizers that torch's has not: {', '.join(sorted(strangers)[:5])}")
    worst: dict[str, int] = {}
    handles = []
    for name, slot, quantizer in each_quantizer(model):
        key = f"{name}.{slot}"
        if key in theirs:
            handles.append(quantizer.register_forward_hook(_judge(key, theirs[key], worst)))
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return worst


def _judge(key: str, theirs: Any, worst: dict[str, int]) -> Any:
    """Make a hook that compares a quantizer's integers and then hands ONNX Runtime's values on."""

    def hook(quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        grid = quantizer.qparams(inputs[0])
        shifted = grid.qmin < 0 and theirs.dtype.kind == "u"
        shift = 2 ** (theirs.dtype.itemsize * 8 - 1) if shifted else 0
        other = torch.from_numpy(theirs.astype(np.float32)).view_as(inputs[0]) - shift  # a file may flatten first
        worst[key] = int((quantize(inputs[0], grid) - other).abs().max())
        return dequantize(other, grid)

    return hook


def _integers(proto: onnx.ModelProto, images: Tensor, options: RuntimeOptions) -> dict[str, Any]:
    """Run ONNX Runtime with every QuantizeLinear's output as an output of the graph; module.slot -> integers."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    names = []
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            kind = initializers[node.input[2]].data_type
            exposed.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
            names.append(node.name.removesuffix(".QuantizeLinear"))
    session = open_session(exposed.SerializeToString(), options, "the exported model")
    outputs = run(session, images.numpy())
    return dict(zip(names, outputs[len(proto.graph.output) :], strict=True))
