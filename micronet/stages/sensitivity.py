"""The ``sensitivity`` report: which layers suffer most from few bits."""

from dataclasses import dataclass
from pathlib import Path

from micronet.core.config import group, setting
from micronet.errors import MicronetError
from micronet.quantization.config import CalibrationConfig, QuantConfig
from micronet.stages.config import DataConfig, ReadSettings, ReportConfig
from micronet.stages.stage import Context, Outcome, Purpose, Stage


@dataclass(frozen=True)
class Sensitivity(ReadSettings, Stage):
    """Quantizes one layer at a time."""

    name = "sensitivity"
    details = (
        "Quantizes one layer at a time and reports the signal-to-noise ratio of the scores and the accuracy drop on "
        "the validation images. The most sensitive layers are listed first."
    )
    example = "micronet sensitivity float.safetensors --w-bits 4 --a-bits 4"
    suffix = None
    cannot_follow = {"quantize": "run it on the float artifact"}  # noqa: RUF012  # never changed
    product = "list[LayerSensitivity]"

    plot: Path | None = setting(
        None, "Save a plot of the sensitivity as a .png or .svg file (needs matplotlib).", basic=True, place="file"
    )
    quantization: QuantConfig = group(QuantConfig)
    calibration: CalibrationConfig = group(CalibrationConfig)
    data: DataConfig = group(DataConfig)
    report: ReportConfig = group(ReportConfig)

    def check(self) -> None:
        """Refuse an option of trainings."""
        super().check()
        if self.calibration.float_weights is not None:
            raise MicronetError("--float-weights has no effect here, because nothing is trained; drop it")

    def plain_weights(self) -> Purpose:
        """Return "running": nothing is trained."""
        return "running"

    def run(self, context: Context) -> Outcome:
        """Measure every layer, calibrated without training."""
        import torch

        from micronet.models.modes import copy_model
        from micronet.quantization.sensitivity import Probe, draw, measure_sensitivity
        from micronet.stages.inputs import (
            calibration_batches,
            check_accepts,
            generated_batches,
            open_data,
            validation_accuracy,
        )
        from micronet.training.config import RunContext

        dataset = open_data(self.data, context.artifact)
        if self.calibration.makes_images:
            run = RunContext(context.output, torch.device("cpu"), progress=context.progress)
            batches = generated_batches(context.artifact, self.data, self.calibration, run)
        else:
            batches = list(calibration_batches(dataset, self.calibration, seed=1))
            check_accepts(context.artifact.model, batches[0])
        probe = Probe(batches, self.calibration, validation_accuracy(dataset, copy_model(context.artifact.model)))
        rows = measure_sensitivity(context.artifact.model, self.quantization, probe, context.progress)
        if self.plot is not None:
            draw(rows, self.plot)
        return Outcome(rows, [{**row._asdict(), "metric": dataset.task.main} for row in rows])
