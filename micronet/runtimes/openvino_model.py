"""Read networks for OpenVINO, and write around what it computes wrongly."""

from typing import Any

REDUCTIONS = {"ReduceMax": "reduce_max", "ReduceMin": "reduce_min"}


def read_model(library: Any, core: Any, path: str) -> Any:
    """Return a network from an ONNX file or an IR, with the same values in a form that OpenVINO computes rightly.

    If ReduceMax or ReduceMin drops axes, OpenVINO 2026.4 quantizes its result with a scale of 1.
    """
    model = core.read_model(path)
    operators = library.opset13
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in REDUCTIONS and not node.get_attributes()["keep_dims"]:
            data, axes = node.input_value(0), node.input_value(1)
            kept = getattr(operators, REDUCTIONS[kind])(data, axes, keep_dims=True)
            squeezed, name = operators.squeeze(kept, axes), node.get_friendly_name()
            readers, names = node.output(0).get_target_inputs(), node.output(0).get_names()
            for reader in readers:
                reader.replace_source_output(squeezed.output(0))
            squeezed.set_friendly_name(name)
            squeezed.output(0).set_names(names)
    return model
