"""The work of ``quantize FILE.onnx --mode ptq``: a float ONNX file, whoever made it, calibrated and made int8."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.load import load_data
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import evaluate
from micronet.onnx import posttraining
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.quantization.histogram import Histogram
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import image_input, metadata, read_onnx, session_predictor
from micronet.stages.config import DataConfig
from micronet.stages.inputs import cached, calibration_batches
from micronet.stages.stage import Context, Outcome


@dataclass(frozen=True)
class FloatModel:
    """A float ONNX model, its ``file`` (for messages), and where its images come from."""

    proto: onnx.ModelProto
    file: Path
    data: DataConfig
    seed: int

    @property
    def has_data(self) -> bool:
        """Whether the model's data set is known: named, or remembered by the model."""
        return self.data.data is not None or bool((metadata(self.proto).get("data") or {}).get("name"))

    def open_data(self) -> Dataset:
        """Open the data set; MicronetError if it is not known."""
        if not self.has_data:
            raise MicronetError(f"{self.file} does not record its data set; specify one with --data")
        remembered, shape = metadata(self.proto).get("data"), input_shape(self.proto)
        is_square = len(shape) == 4 and shape[2] == shape[3]
        size = self.data.image_size or (shape[2] if is_square else None)
        like = DataSpec.from_json(remembered) if remembered else DataSpec(seed=self.seed)
        return load_data(self.data.data, image_size=size, limit=self.data.limit, like=like)


def quantize_file(stage: Any, context: Context) -> Outcome:
    """Quantize the ONNX file that a stage names."""
    model = FloatModel(read_onnx(stage.artifact), stage.artifact, stage.data, stage.execution.seed)
    int8 = to_int8(model, stage.calibration, stage.quantization, context.progress)
    before, after = _accuracies(model, [model.proto, int8])
    return Outcome(int8, {"test_accuracy": after, "float_test_accuracy": before})


def to_int8(model: FloatModel, ranges: RangeConfig, config: QuantConfig, progress: Progress) -> onnx.ModelProto:
    """Return a float model as int8; of ``config``, the signs, symmetry, levels and the weights' bits apply."""
    folded = posttraining.prepare(model.proto)
    symmetric = config.q_type == "sym"
    found = _ranges(replace(model, proto=folded), ranges, progress, symmetric=symmetric)
    return posttraining.quantize_onnx(
        folded,
        found,
        signed=config.a_sign == "signed",
        symmetric=symmetric,
        per_channel=config.q_level == "channel",
        bits=config.w_bits if isinstance(config.w_bits, int) else 0,
    )


def input_shape(proto: onnx.ModelProto) -> list[int | None]:
    """Return the sizes of a model's input, None for those that are dynamic."""
    dims = image_input(proto).type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def _accuracies(model: FloatModel, protos: list[onnx.ModelProto]) -> list[float]:
    data = model.open_data()
    predictors = [session_predictor(proto.SerializeToString(), RuntimeOptions()) for proto in protos]
    return [evaluate(predict, eval_batches(data.test, data.spec)).accuracy for predict in predictors]


def _ranges(
    model: FloatModel, config: RangeConfig, progress: Progress, *, symmetric: bool
) -> dict[str, posttraining.ValueRange]:
    cache, header = config.calib_cache, posttraining.LEGACY_HEADER.encode()
    if cache is not None and cache.exists() and cache.read_bytes()[: len(header)] == header:
        if not symmetric:
            raise MicronetError(f"{cache} contains symmetric ranges from TensorRT; add --q-type sym")
        progress.line(f"read TensorRT's ranges from {cache}")
        found = posttraining.read_legacy_cache(cache)
        if missing := [name for name in posttraining.activations(model.proto) if name not in found]:
            progress.line(
                f"{cache} has no ranges for these tensors, so the nodes that use them stay in float: "
                f"{', '.join(missing[:8])}"
            )
        return found
    histograms = _histograms(model, config, progress)
    return posttraining.find_ranges(histograms, config.calibrator, config.percentile, symmetric=symmetric)


def _histograms(model: FloatModel, config: RangeConfig, progress: Progress) -> dict[str, Histogram]:
    batches: list[NDArray[np.float32]] = []
    for batch in calibration_batches(model.open_data(), config, model.seed):
        batches.append(batch.contiguous().numpy())
        progress.step("reading images", len(batches), config.calib_batches)
    network = model.proto.SerializeToString(deterministic=True)
    depends_on = chain([network], (images.tobytes() for images in batches))
    return cached(config.calib_cache, depends_on, lambda: posttraining.collect(model.proto, batches), progress)
