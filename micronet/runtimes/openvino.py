"""Run networks with OpenVINO on the CPU, and report the precision in which it executed each layer.

It reads ONNX files, and folders that ``export --target openvino`` writes: a network in OpenVINO's own format (IR).
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from numpy.typing import NDArray

from micronet.core.files import NOTE, temporary_folder
from micronet.core.machine import has_vnni, usable_threads
from micronet.core.packages import load_package
from micronet.core.parse import make_record
from micronet.errors import MicronetError
from micronet.evaluation.latency import MEASURE_SECONDS
from micronet.evaluation.network import Scores
from micronet.onnx import graph_view as view
from micronet.onnx.graph_view import GraphView
from micronet.onnx.integers import FLOAT_TRANSPOSED, FLOAT_WEIGHTS, count_layers
from micronet.onnx.other_layers import Kind, kind_of
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import described
from micronet.runtimes.onnx_cost import input_shapes, stored_parameters
from micronet.runtimes.onnxruntime import METADATA_KEY, OnnxPredictor, count_sample_macs, metadata, run, unwrapped
from micronet.runtimes.openvino_model import read_model

MISSING = "--runtime openvino needs OpenVINO; run pip install openvino"
INTEGERS = ("i8", "u8")
MODEL = "model.xml"
FILES = (MODEL, "model.bin")
STORES_FP16 = True
TITLE, PAIRS = "OpenVINO", True


class OpenVinoPredictor(OnnxPredictor):
    """An ONNX file run by OpenVINO, which plans for low latency; float layers are computed in float32."""

    runtime = "openvino"

    def open(self, path: Path, options: RuntimeOptions) -> "OpenVinoSession":
        """Compile a file for the CPU."""
        return OpenVinoSession(path, metadata(self.proto), options)

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what OpenVINO executes in integers, in the form of ``onnx.integers.count_layers``."""
        return executed_layers(stored_layers(self.proto), self.session.precisions())


@dataclass(frozen=True)
class About:
    """What a folder's note says of the network."""

    metadata: dict[str, Any]  # what micronet writes into ONNX files
    params: int
    macs: int | None  # for a sample of the shape that it was exported with
    layers: list[dict[str, Any]]  # of ``stored_layers``


class OpenVinoFolder:
    """A network in a folder that ``write`` wrote, run by OpenVINO."""

    runtime = "openvino"

    def __init__(self, folder: Path, note: dict[str, Any], options: RuntimeOptions) -> None:
        try:
            about = make_record(About, {item.name: note[item.name] for item in fields(About)})
            self._layers = [make_record(Layer, each) for each in about.layers]
            self.data, self.stages = described(about.metadata)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MicronetError(f"{folder / NOTE} is corrupted ({error}); export the network again") from error
        self.session = OpenVinoSession(folder / MODEL, about.metadata, options)
        self.params, self._macs = about.params, about.macs

    def __call__(self, inputs: Any) -> Scores:
        """Return the outputs for a batch, such as the scores (N, K) of images (N, C, H, W) float32."""
        return unwrapped(run(self.session, inputs))

    def macs(self, *shapes: tuple[int, ...]) -> int | None:
        """Return the multiply-accumulates for a sample of the shape that the network was exported with."""
        return self._macs

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what OpenVINO executes in integers, in the form of ``onnx.integers.count_layers``."""
        return executed_layers(self._layers, self.session.precisions())

    def throughput(self, sample: Any) -> dict[str, Any]:
        """Return ``images_per_s`` and ``streams`` if as many samples are computed at a time as OpenVINO chooses.

        ``sample``: an array (1, ...), or a tuple of them if the network takes several inputs.
        """
        return self.session.throughput(sample if isinstance(sample, tuple) else (sample,))


def write(proto: onnx.ModelProto, folder: Path, *, fp16: bool = False) -> dict[str, Any]:
    """Write a network in OpenVINO's format; return what ``OpenVinoFolder`` needs to know of it."""
    openvino, core = load_library(), _core()
    with temporary_folder() as place:
        source = place / "model.onnx"
        source.write_bytes(proto.SerializeToString())
        try:
            # Not convert_model: what it makes of some networks computes small batches wrongly after larger ones.
            openvino.save_model(read_model(openvino, core, str(source)), str(folder / MODEL), compress_to_fp16=fp16)
        except Exception as error:  # whatever an unsupported operator makes it raise
            raise MicronetError(f"OpenVINO cannot run this network: {_reason(error)}") from error
    layers = [asdict(layer) for layer in stored_layers(proto)]
    macs = count_sample_macs(proto, input_shapes(proto))
    return asdict(About(metadata(proto), stored_parameters(proto.graph), macs, layers))


def open_folder(folder: Path, note: dict[str, Any], options: RuntimeOptions) -> OpenVinoFolder:
    """Open a folder that ``write`` wrote, with what it returned."""
    return OpenVinoFolder(folder, note, options)


class OpenVinoSession:
    """A compiled model, with what ``runtimes.onnxruntime.run`` reads of an ONNX Runtime session."""

    def __init__(self, path: Path, about: dict[str, Any], options: RuntimeOptions) -> None:
        if options.device not in (None, "cpu"):
            raise MicronetError(f"--device {options.device}: --runtime openvino only runs on the CPU; drop --device")
        core = _core()
        # By default, OpenVINO computes float layers in bfloat16 if the processor has it: a float32 baseline must not.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options.threads or usable_threads(),
            # A thread that may not leave its core waits there for other programs: 40 ms for 1 on a busy machine.
            "ENABLE_CPU_PINNING": False,
        }
        self._settings = settings
        try:
            self._network = read_model(load_library(), core, str(path))
            self._model = core.compile_model(self._network, "CPU", settings)
        except Exception as error:  # whatever a damaged or unsupported file makes it raise
            raise MicronetError(f"OpenVINO cannot run {path}: {_reason(error)}") from error
        self._metadata = {METADATA_KEY: json.dumps(about)}

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

    def throughput(self, inputs: tuple[NDArray[Any], ...]) -> dict[str, Any]:
        """See ``OpenVinoFolder.throughput``."""
        settings = self._settings | {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": usable_threads()}
        model = _core().compile_model(self._network, "CPU", settings)
        queue, feed = load_library().AsyncInferQueue(model), dict(enumerate(inputs))
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < MEASURE_SECONDS:
            queue.start_async(feed)  # waits for a free request
            done += 1
        queue.wait_all()
        images_per_s = round(done / (time.perf_counter() - start), 1)
        return {"images_per_s": images_per_s, "streams": int(model.get_property("NUM_STREAMS"))}

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


# What OpenVINO adds to the name of a layer that it splits from its bias or its scale; a last one has the output's name.
SUFFIXES = ("", "/WithoutBiases", "/DequantizationMultiply")
COMPUTE = {"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"}  # OpenVINO's layer types


@dataclass(frozen=True)
class Layer:
    """A layer with stored weights."""

    name: str
    kind: Kind  # see ``onnx.other_layers.kind_of``
    quantized: bool  # whether its weights are integers
    nodes: list[str]  # what OpenVINO may call it
    transposed: bool = False
    saturates: bool = False  # whether sums of its products can exceed 16 bits


def stored_layers(proto: onnx.ModelProto) -> list[Layer]:
    """Return the layers of a model that have stored weights."""
    return [
        Layer(
            view.layer_name(layer.node),
            kind_of(layer.node),
            layer.weight_qdq is not None,
            [*(f"{layer.node.name}{suffix}" for suffix in SUFFIXES), str(layer.node.outputs[0].name)],
            layer.node.op_type == "ConvTranspose",
            layer.saturates,
        )
        for layer in GraphView(proto).layers
    ]


def executed_layers(layers: Iterable[Layer], precisions: dict[str, tuple[str, str]]) -> dict[str, Any] | None:
    """Return how many layers were executed in integers, and why others were not.

    Args:
        layers: What ``stored_layers`` returns.
        precisions: What ``OpenVinoSession.precisions`` returns.

    Returns:
        As ``onnx.integers.count_layers`` does, and on processors without VNNI ``saturating``: the layers in integers
        whose sums can saturate. None if no layer is quantized.
    """
    layers = list(layers)
    if not any(layer.quantized for layer in layers):
        return None

    def why_float(layer: Layer) -> str | None:
        precision, kernel = next((precisions[name] for name in layer.nodes if name in precisions), ("", ""))
        if precision in INTEGERS:
            return None
        if not layer.quantized:
            return FLOAT_TRANSPOSED if layer.transposed else FLOAT_WEIGHTS
        return (
            f"OpenVINO computes it in {precision} ({kernel})"
            if precision
            else "OpenVINO does not show it among its operators"
        )

    found = count_layers((layer.kind, layer.name, why_float(layer)) for layer in layers)
    saturating = [layer.name for layer in layers if layer.saturates and why_float(layer) is None]
    return found | ({"saturating": saturating} if saturating and not has_vnni() else {})


def load_library() -> Any:
    """Return OpenVINO's module; raise MicronetError with what to install if it is missing.

    Its own telemetry, which would report the import to its maker, is left out.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then uses a stub
    return load_package("openvino", "OpenVINO", MISSING)


@cache
def _core() -> Any:
    """Return the one ``openvino.Core`` of this process, which is never freed.

    On processors with AMX, each loads a plugin that gives the thread an alternate stack for signals, and restores the
    one before it when it is freed. With several of them, that may be one that is freed already: Ctrl-C then crashes.
    """
    return load_library().Core()


def _reason(error: Exception) -> str:
    """Return the line of an exception that says what is wrong, without the places in OpenVINO's source."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    unknown = [line for line in lines if line.startswith("No conversion rule")]
    said = [line for line in lines if not line.startswith(("Exception from", "Check", "FrontEnd API failed"))]
    return (unknown or said or lines or [type(error).__name__])[-1]
