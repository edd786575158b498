"""ONNX files run by ONNX Runtime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from micronet.core.machine import has_vnni, usable_threads
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError, first_line
from micronet.evaluation.network import Predictor, Scores
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.pixels import to_pixels

# Keeps the int8 kernels of x86 processors without VNNI from saturating in their 16-bit intermediate sums.
EXACT_INT8 = "session.x64quantprecision"
# Float activations times int8 weights are summed in float (1), where the default (4) rounds the activations to 8 bits.
FLOAT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
# An optimisation that quantizes weights which were left float on purpose, where activations have Q/DQ.
QUANTIZES_FLOAT_WEIGHTS = "WeightBiasQuantization"
# One that moves int8 Q/DQ pairs past pools and reshapes, and then does not load what it has made.
MOVES_SIGNED_GRIDS = "QDQPropagationTransformer"
SIGNED_GRID_BUG = "output_dtype INT8 does not match y_zero_point type UINT8"
METADATA_KEY = "micronet"
LARGEST = 2**31 - 2**20  # bytes of weights that protobuf can hold beside the graph
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class OrtPredictor:
    """An ONNX Runtime session."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self._proto = proto = read_onnx(path)
        self._session = open_session(path, options, str(path))
        found = metadata(proto)
        self.data = DataSpec.from_json(found["data"]) if found.get("data") else None
        self.stages = [str(record.get("stage")) for record in found.get("history") or []]
        self._stored = _stored_weights(proto.graph)
        self.params = _count(proto.graph, self._stored)

    def __call__(self, images: Any) -> Scores:
        """Score images."""
        scores: Scores = run(self._session, images)[0]
        return scores

    def macs(self, image_shape: tuple[int, int, int]) -> int | None:
        """Count multiply-accumulates of convolutions and matrix products, from the inferred shapes."""
        graph = onnx.shape_inference.infer_shapes(_with_batch_of_one(self._proto, image_shape)).graph
        shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in graph.value_info}
        shapes |= {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in graph.output}
        total = 0
        for node in graph.node:
            weight = self._stored.get(node.input[1]) if node.op_type in WEIGHTED else None
            if weight is None:
                continue
            out = shapes.get(node.output[0], [])
            if not out or 0 in out:
                return None
            if node.op_type == "Conv":
                total += int(np.prod(out)) * int(np.prod(weight.dims[1:]))
            elif node.op_type == "ConvTranspose":
                total += int(np.prod(shapes[node.input[0]])) * int(np.prod(weight.dims[1:]))
            else:
                total += _elements(weight) * int(np.prod(out[:-1]))
        return total


def image_input(proto: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return a model's one input. Raises MicronetError where it has none, or several."""
    stored = {tensor.name for tensor in proto.graph.initializer}  # old files list these as inputs too
    inputs = [entry for entry in proto.graph.input if entry.name not in stored]
    if len(inputs) != 1:
        raise MicronetError(f"the model has {len(inputs)} inputs; micronet runs networks of one")
    found: onnx.ValueInfoProto = inputs[0]
    return found


def stored_parameters(graph: Any) -> int:
    """Return the number of weights and biases that a graph holds."""
    return _count(graph, _stored_weights(graph))


def _count(graph: Any, stored: dict[str, Any]) -> int:
    read = [name for node in graph.node if node.op_type in WEIGHTED for name in node.input[1:]]
    return sum(map(_elements, {stored[name].name: stored[name] for name in read if name in stored}.values()))


def _stored_weights(graph: Any) -> dict[str, Any]:
    """Return tensor name -> the initialiser it is, or that the DequantizeLinear which makes it reads."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    return stored


def check_size(weights_bytes: int) -> None:
    """Raise MicronetError where weights are more than one protobuf message holds, which is how models are handed on."""
    if weights_bytes >= LARGEST:
        raise MicronetError(
            f"the network's weights are {weights_bytes:,} bytes, and this goes for less than {LARGEST:,} (2 GiB, what "
            "an ONNX file holds in one piece); prune or quantize the network first"
        )


def read_onnx(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file. Raises MicronetError where it is not a whole one."""
    if not path.exists():
        raise MicronetError(f"{path} does not exist; make it with micronet export-onnx")
    try:
        proto = onnx.load(path)
        if not proto.graph.node:
            raise ValueError("it holds no graph")
        onnx.checker.check_model(path)  # not proto: with weights from a second file that may be too large
        return proto
    except Exception as error:  # protobuf's and onnx's own kinds; every one means the same to the user
        raise MicronetError(f"{path} is not a whole ONNX model ({first_line(error)})") from error


def open_session(model: bytes | Path, options: RuntimeOptions, name: str) -> onnxruntime.InferenceSession:
    """Open a session, on the CPU unless told otherwise. Raises MicronetError where ONNX Runtime refuses the model."""
    providers = _providers(options.device)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.threads or usable_threads()
    # Idle threads would otherwise spin on the cores that the next predictor is being timed on.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    exact = options.arithmetic == "exact"
    if exact:
        settings.add_session_config_entry(*FLOAT_PRODUCTS)
        if not has_vnni():
            settings.add_session_config_entry(EXACT_INT8, "1")
    source = str(model) if isinstance(model, Path) else model  # a file's weights may lie in a second one
    disabled = [QUANTIZES_FLOAT_WEIGHTS] if exact else []
    for without in (disabled, [*disabled, MOVES_SIGNED_GRIDS]):
        try:
            return onnxruntime.InferenceSession(source, settings, providers=providers, disabled_optimizers=without)
        except Exception as error:
            if SIGNED_GRID_BUG not in str(error) or MOVES_SIGNED_GRIDS in without:
                raise MicronetError(f"ONNX Runtime cannot run {name}: {first_line(error)}") from error
    raise AssertionError("unreachable")


def _providers(device: str | None) -> list[Any]:
    """Return ONNX Runtime's names for a device, the CPU behind it for what the device cannot run."""
    kind, _, index = (device or "cpu").partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MicronetError(
            f"--device {device}: this ONNX Runtime has none; leave it out, or for cuda install onnxruntime-gpu"
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def session_predictor(model: bytes, options: RuntimeOptions) -> Predictor:
    """Return the predictor that runs a serialized ONNX model."""
    session = open_session(model, options, "the model")

    def predict(images: NDArray[np.float32]) -> Scores:
        scores: Scores = run(session, images)[0]
        return scores

    return predict


def run(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> list[Any]:
    """Return a session's outputs for normalised images (N, C, H, W), in as many calls as its batch size asks for."""
    if len(session.get_inputs()) != 1:
        raise MicronetError(f"the model has {len(session.get_inputs())} inputs; micronet runs networks of one")
    entry = session.get_inputs()[0]
    inputs = _pixels(session, images) if entry.type == "tensor(uint8)" else images
    size = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else len(inputs)
    calls = []
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        whole = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) if len(part) < size else part
        try:
            outs = session.run(None, {entry.name: np.ascontiguousarray(whole)})
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            shape = tuple(images.shape[1:])
            raise MicronetError(f"ONNX Runtime refused images of shape {shape}: {first_line(error)}") from error
        # Only what has a row an image is cut: a tensor inside may hold windows, or nothing of the batch.
        calls.append([out[: len(part)] if out.ndim and len(out) == size else out for out in outs])
    return calls[0] if len(calls) == 1 else [_joined(outs) for outs in zip(*calls, strict=True)]


def _joined(outs: tuple[Any, ...]) -> Any:
    return np.concatenate(outs) if outs[0].ndim else np.stack(outs)


def _pixels(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[np.uint8]:
    about = _parsed(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))
    return to_pixels(images, DataSpec.from_json(about.get("data") or {}))


def metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return what micronet wrote into a model: ``data``, ``history``, …; nothing for one from elsewhere."""
    return _parsed(next((entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY), "{}"))


def _with_batch_of_one(proto: onnx.ModelProto, image_shape: tuple[int, int, int]) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    shape = image_input(copied).type.tensor_type.shape
    for dim, value in zip(shape.dim, (1, *image_shape), strict=False):
        dim.dim_value = value
    return copied


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("data") or {}, dict):
        return {}
    records = found.get("history")
    sound = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    return {**found, "history": records if sound else []}


def _elements(tensor: Any) -> int:
    return int(np.prod(tensor.dims))
