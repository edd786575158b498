"""Float ONNX files, whoever made them, calibrated and made int8. Imports torch, so import it late."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from micronet.cli.options import DataOptions
from micronet.cli.quantize_stage import images
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.load import load_data
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import evaluate
from micronet.onnx.posttraining import (
    LEGACY_HEADER,
    Range,
    collect,
    find_ranges,
    prepare,
    quantize,
    read_legacy_cache,
    without_range,
)
from micronet.quantization.calibration_config import RangeConfig
from micronet.quantization.config import QuantConfig
from micronet.quantization.histogram import Histogram
from micronet.quantization.ptq import load_statistics, save_statistics
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import image_input, metadata, session_predictor


@dataclass(frozen=True)
class Source:
    """A float model, its ``file`` (for messages), and where its images come from."""

    proto: onnx.ModelProto
    file: Path
    data: DataOptions
    seed: int

    def open_data(self) -> Dataset:
        """Open the data named, or those that the model remembers. Raises MicronetError where there are none."""
        remembered = metadata(self.proto).get("data")
        if self.data.data is None and not (remembered or {}).get("name"):
            raise MicronetError(f"{self.file} does not tell which data it is for; name them with --data")
        size = self.data.image_size or fixed_side(self.proto)
        like = DataSpec.from_json(remembered) if remembered else DataSpec(seed=self.seed)
        return load_data(self.data.data, image_size=size, limit=self.data.limit, like=like)


def input_shape(proto: onnx.ModelProto) -> list[int | None]:
    """Return the sizes of a model's input, None for those that are free."""
    dims = image_input(proto).type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def fixed_side(proto: onnx.ModelProto) -> int | None:
    """Return the pixels a side of a model's images, where it takes but one size."""
    shape = input_shape(proto)
    return shape[2] if len(shape) == 4 and shape[2] == shape[3] else None


def to_int8(source: Source, asked: RangeConfig, config: QuantConfig, progress: Progress) -> onnx.ModelProto:
    """Return a float model as int8: of QuantConfig, signs, symmetry, levels and the weights' bits say how."""
    folded = prepare(source.proto)
    symmetric = config.q_type == "sym"
    signed = config.a_sign == "signed"
    ranges = _ranges(Source(folded, source.file, source.data, source.seed), asked, progress, symmetric=symmetric)
    bits = config.w_bits if isinstance(config.w_bits, int) else 0
    return quantize(
        folded, ranges, signed=signed, symmetric=symmetric, per_channel=config.q_level == "channel", bits=bits
    )


def check_config(config: QuantConfig) -> None:
    """Raise MicronetError for what ONNX Runtime's quantizer cannot do to a file."""
    alike = QuantConfig(w_bits=config.w_bits, q_type=config.q_type, q_level=config.q_level, a_sign=config.a_sign)
    if config.w_bits not in (7, 8) or config != alike:
        raise MicronetError(
            "an ONNX file takes --w-bits 7 or 8, --a-bits 8, --q-type, --q-level and --a-sign; for all else quantize "
            "the artifact it came from"
        )
    if config.a_sign == "signed" and config.q_type != "sym":
        raise MicronetError("--a-sign signed, which is for TensorRT, goes with --q-type sym")


def accuracies(source: Source, models: list[onnx.ModelProto]) -> list[float]:
    """Return the test accuracy of each of several models."""
    data = source.open_data()
    predictors = [session_predictor(model.SerializeToString(), RuntimeOptions()) for model in models]
    return [evaluate(predict, eval_batches(data.test, data.spec)).accuracy for predict in predictors]


def _ranges(source: Source, asked: RangeConfig, progress: Progress, *, symmetric: bool) -> dict[str, Range]:
    cache = asked.calib_cache
    if cache is not None and cache.exists() and cache.read_bytes()[: len(LEGACY_HEADER)] == LEGACY_HEADER.encode():
        if not symmetric:
            raise MicronetError(f"{cache} holds TensorRT's symmetric ranges; add --q-type sym")
        progress.line(f"ranges from {cache}, written by TensorRT")
        found = read_legacy_cache(cache)
        if missing := without_range(source.proto, found):
            progress.line(f"not in {cache}, so what reads them stays float: {', '.join(missing[:8])}")
        return found
    return find_ranges(_histograms(source, asked, progress), asked.calibrator, asked.percentile, symmetric=symmetric)


def _histograms(source: Source, asked: RangeConfig, progress: Progress) -> dict[str, Histogram]:
    batches: list[NDArray[np.float32]] = []
    for batch in images(source.open_data(), asked, source.seed, torch.device("cpu")):
        batches.append(batch.contiguous().numpy())
        progress.step("reading images", len(batches), asked.calib_batches)
    if asked.calib_cache is None:
        return collect(source.proto, batches)
    key = hashlib.sha256(source.proto.SerializeToString(deterministic=True))
    for images_ in batches:
        key.update(images_.tobytes())
    if asked.calib_cache.exists():
        progress.line(f"activation statistics from {asked.calib_cache}")
        return load_statistics(asked.calib_cache, key.hexdigest())
    found = collect(source.proto, batches)
    save_statistics(found, asked.calib_cache, key.hexdigest())
    progress.line(f"wrote {asked.calib_cache}")
    return found
