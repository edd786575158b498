"""The layers of an ONNX file as shapes, and what each costs in accuracy if it alone is quantized."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx
from onnx import helper

from micronet.compression.layers import Layer, Shape
from micronet.compression.sensitivities import MOST_NOISE
from micronet.core.progress import Progress
from micronet.onnx import posttraining
from micronet.onnx.feeds import Feed
from micronet.onnx.insertion import ValueRange
from micronet.onnx.ops import CONVOLUTIONS
from micronet.runtimes.onnx_cost import for_one_sample
from micronet.stages.onnx_sensitivity import error_of, layer_names


def find_file_layers(proto: onnx.ModelProto, feed: Feed) -> dict[str, Layer]:
    """Return the layers of known sizes in a model from ``prepare``, by the name of their node.

    ``feed``: an input, which fixes the sizes.
    """
    fixed = for_one_sample(proto, [values.shape[1:] for values in feed.values()])
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        sizes[info.name] = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
    names, found = set(layer_names(proto)), dict[str, Layer]()
    for node in graph.node:
        given = (
            [sizes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0])]
            if node.name in names
            else []
        )
        if given and all(each and all(each) for each in given):
            found[node.name] = Layer(_shape(node, *given), 1, {}, {})
    return found


def _shape(node: onnx.NodeProto, x: tuple[int, ...], weight: tuple[int, ...], y: tuple[int, ...]) -> Shape:
    about: dict[str, Any] = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type not in CONVOLUTIONS:
        inputs, outputs = (weight[1], weight[0]) if about.get("transB") else (weight[-2], weight[-1])
        return Shape("Linear", inputs, outputs, x[1:-1], results=y[1:-1])
    rank, kernel = len(x) - 2, weight[2:]
    ones = (1,) * rank
    pads, strides = tuple(about.get("pads", (0,) * 2 * rank)), tuple(about.get("strides", ones))
    return Shape(
        "Conv" if node.op_type == "Conv" else "ConvTranspose", x[1], y[1], x[2:], kernel, strides,
        pads[:rank], tuple(about.get("dilations", ones)), int(about.get("group", 1)), y[2:],
    )  # fmt: skip


def file_noise(
    folded: onnx.ModelProto, ranges: dict[str, ValueRange], feeds: Sequence[Feed], progress: Progress
) -> dict[str, dict[str, float]]:
    """Return, for each layer quantized alone, the ``noise`` in the outputs and their relative ``error``.

    Args:
        folded: A model from ``prepare``.
        ranges: The ranges of its tensors.
        feeds: The inputs.
        progress: Where to report progress.
    """
    names, found = layer_names(folded), dict[str, dict[str, float]]()
    requantize = partial(_requantize, folded, ranges)
    for done, name in enumerate(names, 1):
        error = error_of(folded, requantize, [other for other in names if other != name], feeds)
        if error is not None:
            found[name] = {"noise": min(error**2, MOST_NOISE), "error": error}
        progress.step("quantizing layers alone", done, len(names))
    return found


def _requantize(folded: onnx.ModelProto, ranges: dict[str, ValueRange], excluded: dict[str, str]) -> onnx.ModelProto:
    return posttraining.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8, excluded=excluded)
