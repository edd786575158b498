"""The ``trt-build`` stage: a TensorRT engine from an artifact or an ONNX file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group
from micronet.core.files import file_hash, write_bytes
from micronet.errors import MicronetError
from micronet.onnx.config import AXES, ExportConfig
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.runtimes.tensorrt.config import USUAL_BATCHES, BuildConfig, Profile
from micronet.stages.config import ConvertSettings, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from micronet.artifact.artifact import Artifact
    from micronet.core.progress import Progress
    from micronet.runtimes.tensorrt.build import Engine
    from micronet.stages.float_model import FloatModel

RANGES = RangeConfig(calibrator="entropy")
REPORTED = ("backend", "version", "precision", "profiles")
SIGNED = QuantConfig(a_sign="signed")  # what TensorRT takes: symmetric, int8, one weight scale per channel
SEED = 1


@dataclass(frozen=True)
class TrtBuild(ConvertSettings, Stage):
    """Builds an engine."""

    name = "trt-build"
    details = (
        "TensorRT-RTX can build without a GPU (pip install tensorrt-rtx-cu13); running an engine requires one. Float "
        "networks are calibrated for int8 on the CPU; --calib-cache also reads calibration caches from TensorRT 10 and "
        "earlier. A JSON file next to the engine records its shapes, the data types of its layers and its source."
    )
    example = "micronet trt-build float.safetensors --precision int8 --calibrator entropy -o int8.engine"
    ending = suffix = ".engine"
    product = "Engine"
    optional_data = True

    artifact: Path = input_file("An artifact or an .onnx file.", kinds=(".safetensors", ".onnx"), metavar="INPUT")
    engine: BuildConfig = group(BuildConfig)
    ranges: RangeConfig = group(RANGES)

    def run(self, context: Context) -> Outcome:
        """Build the engine."""
        from micronet.runtimes.tensorrt.build import datatypes

        engine = _build(context.source, self, context.progress)
        reported = {key: engine.about[key] for key in REPORTED}
        return Outcome(engine, {**reported, "multiplies_in": datatypes(engine.about)})

    def write(self, product: Any, path: Path) -> None:
        """Write the engine, and its description beside it."""
        write_bytes(path, product.data)
        write_bytes(path.with_name(f"{path.name}.json"), json.dumps(product.about, indent=1).encode())


def _build(artifact: "Artifact | None", config: TrtBuild, progress: "Progress") -> "Engine":
    """Return the engine of an artifact or, if that is None, of the ONNX file that the settings name."""
    from micronet.onnx.lint import lint
    from micronet.onnx.posttraining import check_stored
    from micronet.onnx.reader import read_onnx
    from micronet.runtimes.onnx_cost import stored_parameters
    from micronet.runtimes.onnxruntime import metadata
    from micronet.runtimes.tensorrt.build import Engine, build_engine
    from micronet.stages.float_model import FloatModel

    proto = read_onnx(config.artifact) if artifact is None else _exported(artifact, config.engine)
    about = metadata(proto)
    check_stored(proto)
    precision, proto = _typed(FloatModel(proto, config.artifact, config.data, SEED), config, progress)
    if wrong := [finding for finding in lint(proto, "tensorrt") if finding.severity == "error"]:
        raise MicronetError(f"{wrong[0].node}: {wrong[0].message}; {wrong[0].cure}")
    progress.line(f"building for {precision}")
    engine = build_engine(proto, _profiles(proto, config.engine), config.engine)
    described = {
        **engine.about,
        "precision": precision,
        "source": config.artifact.name,
        "source_sha256": file_hash(config.artifact) if config.artifact.is_file() else None,
        "engine_sha256": hashlib.sha256(engine.data).hexdigest(),
        "metadata": about or None,
        "params": stored_parameters(proto.graph),
    }
    return Engine(engine.data, described)


def _exported(artifact: "Artifact", config: BuildConfig) -> "onnx.ModelProto":
    import torch

    from micronet.onnx.export import to_onnx
    from micronet.stages.inputs import example_input

    profiles = config.profiles
    if any(len(profile.usual) != len(AXES) + 1 for profile in profiles):
        raise MicronetError("artifacts need an input shape with four dimensions, NxCxHxW, for example 1x3x224x224")
    ends = [shape for profile in profiles for shape in (profile.smallest, profile.largest)]
    sides = [name for name, axis in AXES.items() if name != "batch" and len({shape[axis] for shape in ends}) > 1]
    export = ExportConfig(target="tensorrt", dynamic=",".join(["batch", *sides]))
    if not profiles:
        example = example_input(artifact)
        if isinstance(example, tuple):
            raise MicronetError("trt-build only supports networks with one input")
        return to_onnx(artifact, example, export)
    batch, *rest = profiles[0].usual
    return to_onnx(artifact, torch.rand(max(2, batch), *rest), export)


def _typed(model: "FloatModel", config: TrtBuild, progress: "Progress") -> "tuple[str, onnx.ModelProto]":
    """Return the engine's precision, and the model in it."""
    import onnx

    from micronet.onnx.posttraining import is_quantized
    from micronet.onnx.rewrite import to_half
    from micronet.stages.quantize_onnx import to_int8

    precision = config.engine.precision
    if is_quantized(model.proto):
        if precision not in ("auto", "int8"):
            raise MicronetError(f"{model.file} is quantized; drop --precision {precision}, or use the float network")
        _check_unused(config, "the network is already quantized")
        return "int8", model.proto
    if precision == "int8":
        return "int8", to_int8(model, config.ranges, SIGNED, progress)[0]
    _check_unused(config, f"--precision {precision} needs no calibration")
    if precision != "fp16":
        has_half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.proto.graph.initializer)
        return "fp16" if has_half else "fp32", model.proto
    half, kept = to_half(model.proto, _images(model, config.engine).numpy())
    if kept:
        progress.line(f"kept in float32: {', '.join(f'{name} ({why} for fp16)' for name, why in kept.items())}")
    return "fp16", half


def _check_unused(config: TrtBuild, why: str) -> None:
    if config.ranges != RANGES:
        raise MicronetError(f"{why}; drop --calibrator and the other calibration options")


def _images(model: "FloatModel", config: BuildConfig) -> "Tensor":
    """Return images to find overflows with: real ones if the data set is known, otherwise noise."""
    import torch

    from micronet.data.batches import eval_batches
    from micronet.stages.quantize_onnx import input_shape

    if model.has_data:
        data = model.open_data()
        images: Tensor = next(eval_batches(data.test, data.spec))[0]
        return images.contiguous()
    usual = config.profiles[0].usual if config.profiles else None
    return torch.randn(usual or [size or 1 for size in input_shape(model.proto)])


def _profiles(proto: "onnx.ModelProto", config: BuildConfig) -> list[Profile]:
    """Return the profiles given, or the usual one for a model whose only dynamic axis is the batch."""
    from micronet.stages.quantize_onnx import input_shape

    batch, *rest = input_shape(proto)
    sizes: list[Any] = [size for size in rest if size is not None]
    if config.profiles or batch is not None or len(sizes) < len(rest):
        return config.profiles
    return [Profile(*((batch, *sizes) for batch in USUAL_BATCHES))]
