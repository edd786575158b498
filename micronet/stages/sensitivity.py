"""The ``sensitivity`` report: which layers suffer most from few bits."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from micronet.core.config import group, setting
from micronet.quantization.config import CalibrationConfig, QuantConfig
from micronet.stages.config import DataConfig, ReadSettings, ReportConfig
from micronet.stages.quantize import QUANTIZE
from micronet.stages.stage import Context, Outcome, Stage


@dataclass(frozen=True)
class SensitivitySettings(ReadSettings):
    """The settings of ``sensitivity``."""

    plot: Path | None = setting(
        None, "Draw the layers into this .png or .svg (needs matplotlib).", basic=True, place="file"
    )
    quantization: QuantConfig = group(QuantConfig)
    calibration: CalibrationConfig = group(CalibrationConfig)
    data: DataConfig = group(DataConfig)
    report: ReportConfig = group(ReportConfig)


class Sensitivity(Stage):
    """Quantizes one layer at a time."""

    name = "sensitivity"
    details = "Accuracy is measured on the validation images. The most sensitive layer comes first."
    example = "micronet sensitivity float.safetensors --w-bits 4 --a-bits 4"
    Config = SensitivitySettings
    suffix = None
    product = "list[LayerSensitivity]"

    def check_order(self, history: Iterable[str], config: object) -> None:
        """Refuse a quantized artifact."""
        super().check_order(history, config)
        Stage.check_order(QUANTIZE, history, config)

    def run(self, config: SensitivitySettings, context: Context) -> Outcome:
        """Measure every layer, calibrated without training."""
        from micronet.quantization.sensitivity import Probe, draw, measure_sensitivity
        from micronet.stages.calibration import calibration_batches
        from micronet.stages.inputs import open_data, validation_accuracy

        dataset = open_data(config.data, context.artifact)
        batches = list(calibration_batches(dataset, config.calibration, seed=1))
        probe = Probe(batches, config.calibration, validation_accuracy(dataset))
        rows = measure_sensitivity(context.artifact.model, config.quantization, probe, context.progress)
        if config.plot is not None:
            draw(rows, config.plot)
        return Outcome(rows, [row._asdict() for row in rows])


SENSITIVITY = Sensitivity()
