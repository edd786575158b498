"""Read networks for OpenVINO, and write around what it computes wrongly."""

from typing import Any

REDUCTIONS = {"ReduceMax": "reduce_max", "ReduceMin": "reduce_min"}
LAYERS = ("Convolution", "GroupConvolution", "MatMul")
FOLDED = ("Convert", "Multiply", "Subtract", "Unsqueeze")  # what a stored bias goes through, besides Reshape


def read_model(library: Any, core: Any, path: str) -> Any:
    """Return a network from an ONNX file or an IR, with the same values in a form that OpenVINO computes rightly."""
    model = core.read_model(path)
    operators = library.opset13
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in REDUCTIONS and not node.get_attributes()["keep_dims"]:
            _keep_axes(operators, node)
        elif kind == "FakeQuantize":
            _move_bias(operators, node)
    return model


def _keep_axes(operators: Any, node: Any) -> None:
    """Reduce to axes of length 1 and drop them then: if they are gone, OpenVINO 2026.4 quantizes with a scale of 1."""
    data, axes = node.input_value(0), node.input_value(1)
    kept = getattr(operators, REDUCTIONS[node.get_type_name()])(data, axes, keep_dims=True)
    _replace(node, operators.squeeze(kept, axes))


def _move_bias(operators: Any, node: Any) -> None:
    """Let the range of a rounding start lower by the bias of the layer before it, which adds none then.

    If anything else reads the layer's output, even its shape, OpenVINO 2026.4 does not add the bias in the layer but in
    the rounding, and there the first channel's to all of them.
    """
    data, low, high, *levels = (node.input_value(index) for index in range(5))
    add = data.get_node()
    if add.get_type_name() != "Add" or len(data.get_target_inputs()) > 1:
        return
    layer, bias = add.input_value(0), add.input_value(1)
    if bias.get_node().get_type_name() in LAYERS:
        layer, bias = bias, layer
    if layer.get_node().get_type_name() in LAYERS and _is_stored(bias):
        low, high = operators.subtract(low, bias), operators.subtract(high, bias)
        _replace(node, operators.fake_quantize(layer, low, high, *levels, node.get_attributes()["levels"]))


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
