"""Read networks for OpenVINO, and write around what it computes wrongly."""

import math
from typing import Any, NamedTuple

from micronet.runtimes.openvino_quantizers import move_quantizers

REDUCTIONS = {
    "ReduceL1": "reduce_l1", "ReduceL2": "reduce_l2", "ReduceMax": "reduce_max", "ReduceMean": "reduce_mean",
    "ReduceMin": "reduce_min", "ReduceProd": "reduce_prod", "ReduceSum": "reduce_sum",
}  # fmt: skip
LAYERS = ("Convolution", "GroupConvolution", "MatMul")
FOLDED = ("Convert", "Multiply", "Subtract", "Unsqueeze")  # what a stored bias goes through, besides Reshape


def read_model(library: Any, core: Any, path: str) -> Any:
    """Return a network from an ONNX file or an IR, with the same values in a form that OpenVINO computes rightly."""
    model = core.read_model(path)
    operators, nodes = library.opset13, model.get_ordered_ops()
    reads_shapes = any(map(_reads_shapes, nodes))
    move_quantizers(operators, nodes)
    for node in nodes:
        kind = node.get_type_name()
        if kind in REDUCTIONS and not node.get_attributes()["keep_dims"]:
            _keep_axes(operators, node)
        elif kind == "FakeQuantize" and reads_shapes:
            _move_bias(operators, node)
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():  # OpenVINO's, from a counter of all that the process made
            node.set_friendly_name(f"{node.get_type_name()}.{number}")
    return model


def _keep_axes(operators: Any, node: Any) -> None:
    """Reduce to axes of length 1 and drop them then: if they are gone, OpenVINO 2026.4 quantizes with a scale of 1."""
    data, axes = node.input_value(0), node.input_value(1)
    kept = getattr(operators, REDUCTIONS[node.get_type_name()])(data, axes, keep_dims=True)
    _replace(node, operators.squeeze(kept, axes))


def _move_bias(operators: Any, node: Any) -> None:
    """Let the range of a rounding start lower by the bias of the layer before it, which adds none then.

    If anything else reads the layer's output, even its shape, OpenVINO 2026.4 does not add the bias in the layer but in
    the rounding, and there the first channel's to all of them; so too behind a ReLU whose limits are the rounding's.
    """
    _, low, high, *levels = (node.input_value(index) for index in range(5))
    data = _before_clips(node)
    add = data.get_node()
    if add.get_type_name() != "Add" or len(data.get_target_inputs()) > 1:
        return
    layer, bias = add.input_value(0), add.input_value(1)
    if bias.get_node().get_type_name() in LAYERS:
        layer, bias = bias, layer
    if layer.get_node().get_type_name() in LAYERS and _is_stored(bias):
        low, high = operators.subtract(low, bias), operators.subtract(high, bias)
        _replace(node, operators.fake_quantize(layer, low, high, *levels, node.get_attributes()["levels"]))


def _before_clips(rounding: Any) -> Any:
    """Return what a rounding reads, before the ReLUs and clips that change nothing which it would keep."""
    value, *ends = (rounding.input_value(index) for index in range(3))
    low, high = map(_constant, ends)
    if low is None or high is None:
        return value
    half = 0.5 * (high - low) / (rounding.get_attributes()["levels"] - 1)
    while (clip := _clip(value.get_node())) is not None and clip.low - half < low and high < clip.high + half:
        if len(value.get_target_inputs()) > 1:
            break
        value = clip.value
    return value


class _Clip(NamedTuple):
    low: float
    high: float
    value: Any  # what is clipped


def _clip(node: Any) -> _Clip | None:
    """Return what a node does if it clips to constants, or nothing at all."""
    kind = node.get_type_name()
    if kind in ("Relu", "Identity"):
        return _Clip(0.0 if kind == "Relu" else -math.inf, math.inf, node.input_value(0))
    if kind == "Clamp":
        return _Clip(node.get_attributes()["min"], node.get_attributes()["max"], node.input_value(0))
    if kind in ("Minimum", "Maximum"):
        for limit, value in (node.input_values(), reversed(node.input_values())):
            if (end := _constant(limit)) is not None:
                return _Clip(end, math.inf, value) if kind == "Maximum" else _Clip(-math.inf, end, value)
    return None


def _constant(value: Any) -> float | None:
    """Return a stored number, or None for all else."""
    node = value.get_node()
    return float(node.data.item()) if node.get_type_name() == "Constant" and node.data.size == 1 else None


def _reads_shapes(node: Any) -> bool:
    """Return True for a node that reads sizes which differ between batches; those of biases say only their rank."""
    if node.get_type_name() != "ShapeOf" or not node.input_value(0).get_partial_shape().is_dynamic:
        return False
    return any(each.get_node().get_type_name() != "ShapeOf" for each in node.output(0).get_target_inputs())


def _is_stored(value: Any) -> bool:
    """Return True if a value depends on nothing but constants."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Reshape":  # to a shape that may be computed, as the reader of ONNX files writes it
        return _is_stored(node.input_value(0))
    return kind == "Constant" or (kind in FOLDED and all(_is_stored(each) for each in node.input_values()))


def _replace(node: Any, new: Any) -> None:
    """Let what reads a node read another one, which gets its names."""
    name, names = node.get_friendly_name(), node.output(0).get_names()
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
    new.set_friendly_name(name)
    new.output(0).set_names(names)
