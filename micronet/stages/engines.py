"""The work of ``trt-build``: any input as a model that TensorRT takes, then the engine."""

import hashlib
from typing import Any

import onnx
import torch
from torch import Tensor

from micronet.artifact.artifact import Artifact
from micronet.core.files import file_hash
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.errors import MicronetError
from micronet.onnx.config import AXES, ExportConfig
from micronet.onnx.export import to_onnx
from micronet.onnx.lint import lint
from micronet.onnx.posttraining import check_stored, is_quantized
from micronet.onnx.rewrite import kept_line, to_half
from micronet.quantization.config import QuantConfig
from micronet.runtimes.onnxruntime import metadata, read_onnx, stored_parameters
from micronet.runtimes.tensorrt.build import Engine, build_engine
from micronet.runtimes.tensorrt.config import BuildConfig, Profile, usual_profile
from micronet.stages.inputs import example_input
from micronet.stages.quantizing_onnx import FloatModel, input_shape, to_int8
from micronet.stages.trt_build import RANGES

SIGNED = QuantConfig(a_sign="signed")  # what TensorRT takes: symmetric, int8, one weight scale per channel
SEED = 1


def build(artifact: Artifact | None, config: Any, progress: Progress) -> Engine:
    """Return the engine that the config of ``trt-build`` describes; ``artifact``: None for an ONNX file."""
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


def _exported(artifact: Artifact, config: BuildConfig) -> onnx.ModelProto:
    profiles = config.profiles
    if any(len(profile.usual) != len(AXES) + 1 for profile in profiles):
        raise MicronetError("an artifact's input shape has four dimensions, NxCxHxW, for example 1x3x224x224")
    sides = [name for name, axis in AXES.items() if name != "batch" and _varies(profiles, axis)]
    export = ExportConfig(target="tensorrt", dynamic=",".join(["batch", *sides]))
    return to_onnx(artifact, _example(artifact, profiles), export)


def _example(artifact: Artifact, profiles: list[Profile]) -> Tensor:
    if not profiles:
        return example_input(artifact)
    batch, *rest = profiles[0].usual
    return torch.rand(max(2, batch), *rest)


def _varies(profiles: list[Profile], axis: int) -> bool:
    return len({shape[axis] for profile in profiles for shape in (profile.smallest, profile.largest)}) > 1


def _typed(model: FloatModel, config: Any, progress: Progress) -> tuple[str, onnx.ModelProto]:
    """Return the engine's precision, and the model in it."""
    precision = config.engine.precision
    if is_quantized(model.proto):
        if precision not in ("auto", "int8"):
            raise MicronetError(
                f"{model.file} is quantized; leave out --precision {precision}, or give the float network"
            )
        _check_unused(config, "the network is quantized")
        return "int8", model.proto
    if precision == "int8":
        return "int8", to_int8(model, config.ranges, SIGNED, progress)
    _check_unused(config, f"--precision {precision} uses no ranges")
    if precision != "fp16":
        has_half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.proto.graph.initializer)
        return "fp16" if has_half else "fp32", model.proto
    half, kept = to_half(model.proto, _images(model, config.engine).numpy())
    if kept:
        progress.line(kept_line(kept))
    return "fp16", half


def _check_unused(config: Any, why: str) -> None:
    if config.ranges != RANGES:
        raise MicronetError(f"{why}; leave --calibrator and the other calibration options out")


def _images(model: FloatModel, config: BuildConfig) -> Tensor:
    """Return images to find overflows with: real ones if the data are known, otherwise noise."""
    if model.data.data is not None or (metadata(model.proto).get("data") or {}).get("name"):
        data = model.open_data()
        return next(eval_batches(data.test, data.spec))[0].contiguous()
    usual = config.profiles[0].usual if config.profiles else None
    return torch.randn(usual or [size or 1 for size in input_shape(model.proto)])


def _profiles(proto: onnx.ModelProto, config: BuildConfig) -> list[Profile]:
    """Return the profiles given, or the usual one for a model whose only dynamic axis is the batch."""
    batch, *rest = input_shape(proto)
    sizes: list[Any] = [size for size in rest if size is not None]
    if config.profiles or batch is not None or len(sizes) < len(rest):
        return config.profiles
    return [usual_profile(tuple(sizes))]
