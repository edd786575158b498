"""Run ONNX files with ONNX Runtime."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from micronet.core.files import temporary_folder
from micronet.core.machine import has_vnni, usable_threads
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.evaluation.network import Predictor, Scores
from micronet.onnx.metadata import METADATA_KEY as METADATA_KEY
from micronet.onnx.metadata import metadata as metadata
from micronet.onnx.metadata import note as note
from micronet.onnx.metadata import parsed
from micronet.onnx.reader import read_onnx
from micronet.onnx.stored import MAX_WEIGHT_BYTES
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import described, to_pixels
from micronet.runtimes.onnx_batches import reason, run_batch
from micronet.runtimes.onnx_cost import count_macs, for_one_sample, stored_parameters

# Keeps the int8 kernels of x86 processors without VNNI from saturating in their 16-bit intermediate sums.
EXACT_INT8 = "session.x64quantprecision"
# Level 1 sums products of float activations and int8 weights in float; the default, 4, rounds activations to 8 bits.
FLOAT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
# This optimizer quantizes weights that were left float on purpose if the activations have Q/DQ.
QUANTIZES_FLOAT_WEIGHTS = "WeightBiasQuantization"
# This optimizer moves int8 Q/DQ pairs across pools and reshapes, and then fails to load the result.
MOVES_INT8_QDQ = "QDQPropagationTransformer"
INT8_QDQ_BUG = "output_dtype INT8 does not match y_zero_point type UINT8"
SILENT = 4  # what ONNX Runtime logs, it also raises


class OnnxPredictor:
    """A network in an ONNX file; the subclass says which runtime opens it."""

    runtime: str

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self.proto = read_onnx(path)
        self.session = self.open(path, options)
        self.data, self.stages = described(metadata(self.proto))
        self.params = stored_parameters(self.proto.graph)

    def open(self, path: Path, options: RuntimeOptions) -> Any:
        """Return a session with what ``run`` needs of one: get_inputs, get_modelmeta and run."""
        raise NotImplementedError

    def __call__(self, inputs: Any) -> Scores:
        """Return the outputs for a batch, such as the scores (N, K) of images (N, C, H, W) float32."""
        return unwrapped(run(self.session, inputs))

    def macs(self, *shapes: tuple[int, ...]) -> int | None:
        """Count the multiply-accumulates of convolutions and matrix products, or return None if shapes are unknown."""
        return count_sample_macs(self.proto, shapes)


class OrtPredictor(OnnxPredictor):
    """A network run by an ONNX Runtime session."""

    runtime = "onnxruntime"

    def open(self, path: Path, options: RuntimeOptions) -> onnxruntime.InferenceSession:
        """Open a session."""
        return open_session(path, options, str(path))

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what is computed in integers; see ``onnx.integers.count_integer_layers``."""
        return self._integer_layers

    @cached_property
    def _integer_layers(self) -> dict[str, Any] | None:
        from micronet.onnx.integers import count_integer_layers  # imports this module

        return count_integer_layers(self.proto)


def count_sample_macs(proto: onnx.ModelProto, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Return the multiply-accumulates of a model for one sample, or None if they cannot be counted.

    ``shapes``: of its inputs, without the batch.
    """
    fixed = for_one_sample(proto, shapes)
    found = count_macs(fixed)
    if found is not None:
        return found
    try:  # ONNX Runtime folds what shapes are computed from
        return count_macs(optimize(fixed.SerializeToString(), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC))
    except Exception:  # a model that ONNX Runtime refuses, or too large for one message
        return None


def check_size(weights_bytes: int) -> None:
    """Raise MicronetError if weights do not fit one protobuf message, the form in which models are passed on."""
    if weights_bytes >= MAX_WEIGHT_BYTES:
        raise MicronetError(
            f"the network's weights take up {weights_bytes:,} bytes, but those in an ONNX file must take up less than "
            f"{MAX_WEIGHT_BYTES:,} (2 GiB); prune or quantize the network first"
        )


def open_session(model: bytes | Path, options: RuntimeOptions, name: str) -> onnxruntime.InferenceSession:
    """Open a session, by default on the CPU.

    Args:
        model: A file, or a serialized model.
        options: Device, threads and arithmetic.
        name: What error messages call the model.

    Raises:
        MicronetError: ONNX Runtime refuses the model, or does not support the device.
    """
    providers = _providers(options.device)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = SILENT
    settings.intra_op_num_threads = options.threads or usable_threads()
    # Otherwise idle threads spin on the cores on which the next predictor is timed.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    exact = options.arithmetic == "exact"
    if exact:
        settings.add_session_config_entry(*FLOAT_PRODUCTS)
        if not has_vnni():
            settings.add_session_config_entry(EXACT_INT8, "1")
    source = str(model) if isinstance(model, Path) else model  # a file may keep its weights in a second file
    disabled = [QUANTIZES_FLOAT_WEIGHTS] if exact else []
    for optimizers in (disabled, [*disabled, MOVES_INT8_QDQ]):
        try:
            return onnxruntime.InferenceSession(source, settings, providers=providers, disabled_optimizers=optimizers)
        except Exception as error:
            if INT8_QDQ_BUG not in str(error) or MOVES_INT8_QDQ in optimizers:
                raise MicronetError(f"ONNX Runtime cannot run {name}: {reason(error)}") from error
    raise AssertionError("unreachable")


def _providers(device: str | None) -> list[Any]:
    """Return ONNX Runtime's providers for a device, with the CPU as a fallback."""
    kind, _, index = (device or "cpu").partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MicronetError(
            f"--device {device}: the installed ONNX Runtime does not support this device; drop --device, or install "
            "onnxruntime-gpu for cuda"
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def session_predictor(model: bytes, options: RuntimeOptions) -> Predictor:
    """Return a predictor for a serialized ONNX model."""
    session = open_session(model, options, "the model")
    return lambda inputs: unwrapped(run(session, inputs))


def unwrapped(outputs: list[Any]) -> Scores:
    """Return a single output as it is, several as a list."""
    return outputs[0] if len(outputs) == 1 else outputs


def exposing_session(proto: onnx.ModelProto, names: Iterable[str]) -> Any:
    """Open a session that returns inner tensors too, after the model's own outputs."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return open_session(exposed.SerializeToString(), RuntimeOptions(), "the model")


def optimize(model: bytes | Path, level: Any) -> onnx.ModelProto:
    """Return a model as ONNX Runtime optimizes it for the CPU; raise MicronetError if it refuses the model.

    ``level``: a GraphOptimizationLevel.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = SILENT
    settings.graph_optimization_level = level
    with temporary_folder() as folder:
        settings.optimized_model_filepath = str(folder / "optimized.onnx")
        try:
            source = str(model) if isinstance(model, Path) else model
            onnxruntime.InferenceSession(source, settings, providers=_providers(None))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise MicronetError(f"ONNX Runtime cannot run the model: {reason(error)}") from error
        return onnx.load(settings.optimized_model_filepath, load_external_data=False)


def run(session: Any, given: NDArray[Any] | tuple[NDArray[Any], ...]) -> list[Any]:
    """Return a session's outputs for normalized images (N, C, H, W) float32 or other inputs; see ``run_batch``."""
    entries = session.get_inputs()
    if isinstance(given, tuple):
        return run_batch(session, given)
    if len(entries) == 1 and entries[0].type == "tensor(uint8)" and given.dtype == np.float32:
        about = parsed(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))
        given = to_pixels(given, DataSpec.from_json(about.get("data") or {}))
    return run_batch(session, [given])
