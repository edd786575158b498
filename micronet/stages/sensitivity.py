"""The ``sensitivity`` report: which layers suffer most from few bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.core.config import group, setting
from micronet.quantization.calibration_config import CalibrationConfig
from micronet.quantization.config import QuantConfig
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import DataConfig, ReportConfig, input_file
from micronet.stages.quantize import QUANTIZE
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class SensitivitySettings:
    """The settings of ``sensitivity``."""

    artifact: Path = input_file()
    plot: Path | None = setting(
        None, "Draw the layers into this .png or .svg (needs matplotlib).", basic=True, place="file"
    )
    quantization: QuantConfig = group(QuantConfig)
    calibration: CalibrationConfig = group(CalibrationConfig)
    data: DataConfig = group(DataConfig)
    code: CodeOptions = group(CodeOptions)
    report: ReportConfig = group(ReportConfig)


class Sensitivity(Stage):
    """Quantizes one layer at a time."""

    name = "sensitivity"
    details = "Accuracy is measured on the validation images. The most sensitive layer comes first."
    example = "micronet sensitivity float.safetensors --w-bits 4 --a-bits 4"
    Config = SensitivitySettings
    suffix = None
    product = "list[LayerSensitivity]"

    def check_order(self, history: "Iterable[str]", config: object) -> None:
        """Refuse a quantized artifact."""
        super().check_order(history, config)
        Stage.check_order(QUANTIZE, history, config)

    def run(self, artifact: "Artifact | None", config: SensitivitySettings, context: Context) -> Outcome:
        """Measure every layer, calibrated without training."""
        from micronet.quantization.sensitivity import Probe, draw, measure_sensitivity
        from micronet.stages.calibration import calibration_batches
        from micronet.stages.inputs import open_data, validation_accuracy

        assert artifact is not None
        dataset = open_data(config.data, artifact)
        batches = list(calibration_batches(dataset, config.calibration, seed=1))
        probe = Probe(batches, config.calibration, validation_accuracy(dataset))
        rows = measure_sensitivity(artifact.model, config.quantization, probe, context.progress)
        if config.plot is not None:
            draw(rows, config.plot)
        return Outcome(rows, [row._asdict() for row in rows])


SENSITIVITY = Sensitivity()
