"""The ``evaluate`` report: accuracy, loss and latency of one network."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.core.config import group
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.compare import NETWORKS, measure
from micronet.stages.config import DataConfig, ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

RELATIVE = ("drop", "agreement", "compression")  # figures that need a second network


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings of ``evaluate``."""

    file: Path = input_file("An artifact, or an .onnx, .packed or .engine file.", kinds=NETWORKS, metavar="FILE")
    data: DataConfig = group(DataConfig)
    runtime: RuntimeOptions = group(RuntimeOptions)
    report: ReportConfig = group(ReportConfig)


class Evaluate(Stage):
    """Evaluates a network."""

    name = "evaluate"
    example = "micronet evaluate int8.onnx --json"
    Config = EvaluateSettings
    suffix = None
    product = "Row"

    def run(self, artifact: "Artifact | None", config: EvaluateSettings, context: Context) -> Outcome:
        """Measure the network on the test images."""
        row = measure([config.file], config.data, config.runtime, context)[0]
        return Outcome(row, {key: value for key, value in row.to_json().items() if key not in RELATIVE})


EVALUATE = Evaluate()
