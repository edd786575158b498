"""The trt-build command's work: any input as a model that TensorRT takes, then the engine. Imports torch late."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from micronet.artifact.artifact import Artifact
from micronet.cli import stages
from micronet.cli.onnx_stage import Source, input_shape, to_int8
from micronet.cli.options import DataOptions
from micronet.core.files import file_hash, write_bytes, write_text
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.errors import MicronetError
from micronet.onnx.config import AXES, ExportConfig
from micronet.onnx.export import to_onnx
from micronet.onnx.lint import lint
from micronet.onnx.posttraining import check_stored, is_quantized
from micronet.onnx.rewrite import kept_line, to_half
from micronet.quantization.calibration_config import RangeConfig
from micronet.quantization.config import QuantConfig
from micronet.runtimes.config import CodeOptions
from micronet.runtimes.onnxruntime import metadata, read_onnx, stored_parameters
from micronet.runtimes.tensorrt.build import Engine, build_engine
from micronet.runtimes.tensorrt.config import BuildConfig, Profile, usual_profile

SIGNED = QuantConfig(a_sign="signed")  # what TensorRT takes: symmetric, int8, a scale a channel of weights
SEED = 1


@dataclass(frozen=True)
class Wish:
    """What is asked of the command. ``file``: an artifact or an ONNX file."""

    file: Path
    engine: BuildConfig
    ranges: RangeConfig
    data: DataOptions
    code: CodeOptions


def build(wish: Wish, progress: Progress) -> Engine:
    """Return the engine, and its description with where it came from."""
    proto = read_onnx(wish.file) if wish.file.suffix == ".onnx" else _exported(wish)
    about = metadata(proto)
    check_stored(proto)
    precision, proto = _typed(Source(proto, wish.file, wish.data, SEED), wish, progress)
    if wrong := [finding for finding in lint(proto, "tensorrt") if finding.severity == "error"]:
        raise MicronetError(f"{wrong[0].node}: {wrong[0].message}; {wrong[0].cure}")
    progress.line(f"building for {precision}")
    engine = build_engine(proto, _profiles(proto, wish.engine), wish.engine)
    source = file_hash(wish.file)
    described = {
        **engine.about,
        "precision": precision,
        "source": wish.file.name,
        "source_sha256": source,
        "engine_sha256": hashlib.sha256(engine.data).hexdigest(),
        "metadata": about or None,
        "params": stored_parameters(proto.graph),
    }
    return Engine(engine.data, described)


def write(engine: Engine, path: Path) -> None:
    """Write an engine, and its description as JSON beside it."""
    write_bytes(path, engine.data)
    write_text(path.with_name(f"{path.name}.json"), json.dumps(engine.about, indent=1))


def _exported(wish: Wish) -> onnx.ModelProto:
    artifact = stages.open_artifact(wish.file, wish.code)
    profiles = wish.engine.profiles
    if any(len(profile.usual) != len(AXES) + 1 for profile in profiles):
        raise MicronetError("an artifact's shapes have four sizes, NxCxHxW, for example 1x3x224x224")
    sides = [name for name, axis in AXES.items() if name != "batch" and _varies(profiles, axis)]
    config = ExportConfig(target="tensorrt", dynamic=",".join(["batch", *sides]))
    return to_onnx(artifact, _example(artifact, profiles), config)


def _example(artifact: Artifact, profiles: list[Profile]) -> Tensor:
    if not profiles:
        return stages.example_input(artifact)
    batch, *rest = profiles[0].usual
    return torch.rand(max(2, batch), *rest)


def _varies(profiles: list[Profile], axis: int) -> bool:
    return len({shape[axis] for profile in profiles for shape in (profile.smallest, profile.largest)}) > 1


def _typed(source: Source, wish: Wish, progress: Progress) -> tuple[str, onnx.ModelProto]:
    """Return the precision that follows from what is asked and what the model is, and the model in it."""
    asked = wish.engine.precision
    if is_quantized(source.proto):
        if asked not in ("auto", "int8"):
            raise MicronetError(f"{source.file} is quantized; leave --precision {asked} out, or give the float network")
        _check_unused(wish, "the network is quantized")
        return "int8", source.proto
    if asked == "int8":
        return "int8", to_int8(source, wish.ranges, SIGNED, progress)
    _check_unused(wish, f"--precision {asked} takes no ranges")
    if asked != "fp16":
        halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in source.proto.graph.initializer)
        return "fp16" if halves else "fp32", source.proto
    half, kept = to_half(source.proto, _images(source, wish).numpy())
    if kept:
        progress.line(kept_line(kept))
    return "fp16", half


def _check_unused(wish: Wish, why: str) -> None:
    if wish.ranges != RangeConfig(calibrator="entropy"):
        raise MicronetError(f"{why}; leave --calibrator and the other options of ranges out")


def _images(source: Source, wish: Wish) -> Tensor:
    """Return images to find overflows on: real ones where the data are known, else noise."""
    if wish.data.data is not None or (metadata(source.proto).get("data") or {}).get("name"):
        data = source.open_data()
        return next(eval_batches(data.test, data.spec))[0].contiguous()
    usual = wish.engine.profiles[0].usual if wish.engine.profiles else None
    return torch.randn(usual or [size or 1 for size in input_shape(source.proto)])


def _profiles(proto: onnx.ModelProto, config: BuildConfig) -> list[Profile]:
    """Return the profiles asked for, or for a model whose batch alone is free the usual one."""
    batch, *rest = input_shape(proto)
    sizes: list[Any] = [size for size in rest if size is not None]
    if config.profiles or batch is not None or len(sizes) < len(rest):
        return config.profiles
    return [usual_profile(tuple(sizes))]
