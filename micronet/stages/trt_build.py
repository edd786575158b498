"""The ``trt-build`` stage: a TensorRT engine from an artifact or an ONNX file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group
from micronet.quantization.calibration_config import RangeConfig
from micronet.runtimes.config import CodeOptions
from micronet.runtimes.tensorrt.config import BuildConfig
from micronet.stages.config import DataConfig, OutputConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

RANGES = RangeConfig(calibrator="entropy")
REPORTED = ("backend", "version", "precision", "profiles")


@dataclass(frozen=True)
class TrtBuildSettings:
    """The settings of ``trt-build``."""

    artifact: Path = input_file("An artifact or an .onnx file.", kinds=(".safetensors", ".onnx"), metavar="INPUT")
    engine: BuildConfig = group(BuildConfig)
    ranges: RangeConfig = group(RANGES)
    data: DataConfig = group(DataConfig)
    code: CodeOptions = group(CodeOptions)
    output: OutputConfig = group(OutputConfig)


class TrtBuild(Stage):
    """Builds an engine."""

    name = "trt-build"
    details = (
        "TensorRT-RTX builds without a GPU (pip install tensorrt-rtx-cu13); running an engine needs one. A float "
        "network is calibrated for int8 here, on the CPU; --calib-cache also reads the caches that TensorRT up to "
        "version 10 wrote. A JSON file beside the engine holds its shapes, the data types of its layers and its origin."
    )
    example = "micronet trt-build float.safetensors --precision int8 --calibrator entropy -o int8.engine"
    Config = TrtBuildSettings
    ending = ".engine"
    suffix = ".engine"
    product = "Engine"

    def run(self, artifact: "Artifact | None", config: TrtBuildSettings, context: Context) -> Outcome:
        """Build the engine."""
        from micronet.runtimes.tensorrt.build import datatypes
        from micronet.stages.engines import build

        engine = build(artifact, config, context.progress)
        reported = {key: engine.about[key] for key in REPORTED}
        return Outcome(engine, {**reported, "multiplies_in": datatypes(engine.about)})

    def write(self, product: Any, path: Path) -> None:
        """Write the engine, and its description beside it."""
        import json

        from micronet.core.files import write_bytes, write_text

        write_bytes(path, product.data)
        write_text(path.with_name(f"{path.name}.json"), json.dumps(product.about, indent=1))


TRT_BUILD = TrtBuild()
