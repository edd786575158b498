"""Run ONNX files with OpenVINO on the CPU, and report the precision in which it executed each layer."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from numpy.typing import NDArray

from micronet.core.machine import usable_threads
from micronet.errors import MicronetError
from micronet.onnx.graph_view import GraphView, WeightedNode
from micronet.onnx.integers import FLOAT_WEIGHTS, count_layers
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import METADATA_KEY, OnnxPredictor

MISSING = "--runtime openvino needs OpenVINO; run pip install openvino"
INTEGERS = ("i8", "u8")


class OpenVinoPredictor(OnnxPredictor):
    """A network run by OpenVINO, which plans for low latency; float layers are computed in float32."""

    runtime = "openvino"

    def open(self, path: Path, options: RuntimeOptions) -> "OpenVinoSession":
        """Compile a file for the CPU."""
        return OpenVinoSession(path, self.proto, options)

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what OpenVINO executes in integers, in the form of ``onnx.integers.count_layers``."""
        return executed_layers(self.proto, self.session.precisions()) if GraphView(self.proto).qdq else None


class OpenVinoSession:
    """A compiled model, with what ``runtimes.onnxruntime.run`` reads of an ONNX Runtime session."""

    def __init__(self, path: Path, proto: onnx.ModelProto, options: RuntimeOptions) -> None:
        if options.device not in (None, "cpu"):
            raise MicronetError(f"--device {options.device}: --runtime openvino only runs on the CPU; drop --device")
        openvino = load_library()
        # By default, OpenVINO computes float layers in bfloat16 if the processor has it: a float32 baseline must not.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options.threads or usable_threads(),
        }
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # whatever a damaged or unsupported file makes it raise
            raise MicronetError(f"OpenVINO cannot run {path}: {_reason(error)}") from error
        self._metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY}

    def get_inputs(self) -> list[Any]:
        """Return the inputs: ``name``, ``type`` and ``shape``, whose free sizes are None."""
        return [
            SimpleNamespace(
                name=port.any_name,
                type=port.element_type.to_dtype().name,
                shape=[None if size.is_dynamic else size.get_length() for size in port.partial_shape],
            )
            for port in self._model.inputs
        ]

    def get_modelmeta(self) -> Any:
        """Return what the file says of itself, as ``custom_metadata_map``."""
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, _: None, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the outputs for the arrays in a feed."""
        outputs = self._model(feed)
        return [outputs[port].copy() for port in self._model.outputs]

    def precisions(self) -> dict[str, tuple[str, str]]:
        """Return the precision and the kernel in which each operator of the file was executed, by its name.

        Operators that OpenVINO fuses share those of the result.
        """
        found: dict[str, tuple[str, str]] = {}
        for node in self._model.get_runtime_model().get_ordered_ops():
            about = node.get_rt_info()
            kind, precision, kernel, names = (
                about[key].astype(str) if key in about else ""
                for key in ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
            )
            for name in names.split(",") if kind in COMPUTE else ():
                found[name] = precision, kernel
        return found


COMPUTE = {"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"}  # OpenVINO's layer types


def executed_layers(proto: onnx.ModelProto, precisions: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return how many layers with stored weights were executed in integers, and why others were not.

    Args:
        proto: The file.
        precisions: What ``OpenVinoSession.precisions`` returns.

    Returns:
        As ``onnx.integers.count_layers`` does.
    """

    def why_float(layer: WeightedNode) -> str | None:
        # OpenVINO names a layer that it splits from its bias so, and a last one after the output.
        names = (layer.node.name, f"{layer.node.name}/WithoutBiases", str(layer.node.outputs[0].name))
        precision, kernel = next((precisions[name] for name in names if name in precisions), ("", ""))
        if precision in INTEGERS:
            return None
        why = f"OpenVINO computes it in {precision} ({kernel})" if precision else "it is fused"
        return FLOAT_WEIGHTS if layer.weight_qdq is None else why

    return count_layers(GraphView(proto), why_float)


def load_library() -> Any:
    """Return OpenVINO's module; raise MicronetError with what to install if it is missing.

    Its own telemetry, which would report the import to its maker, is left out.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then uses a stub
    try:
        import openvino
    except ImportError as error:
        raise MicronetError(MISSING) from error
    return openvino


def _reason(error: Exception) -> str:
    """Return the line of an exception that says what is wrong, without the places in OpenVINO's source."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    unknown = [line for line in lines if line.startswith("No conversion rule")]
    said = [line for line in lines if not line.startswith(("Exception from", "Check", "FrontEnd API failed"))]
    return (unknown or said or lines or [type(error).__name__])[-1]
