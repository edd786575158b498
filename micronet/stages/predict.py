"""The ``predict`` report: what a network sees in image files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.core.config import group, setting
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.compare import NETWORKS
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.evaluation.network import Network


@dataclass(frozen=True)
class PredictSettings:
    """The settings of ``predict``."""

    file: Path = input_file("An artifact, or an .onnx, .packed or .engine file.", kinds=NETWORKS, metavar="NETWORK")
    images: list[Path] = setting(help="Image files, or folders of them.", argument=True, metavar="IMAGE...")
    top: int = setting(5, "Number of classes to list per image.", low=1, basic=True)
    runtime: RuntimeOptions = group(RuntimeOptions)
    report: ReportConfig = group(ReportConfig)


class Predict(Stage):
    """Classifies image files."""

    name = "predict"
    example = "micronet predict int8.onnx photo.png --top 3"
    Config = PredictSettings
    suffix = None
    product = "list[Prediction]"

    def run(self, artifact: "Artifact | None", config: PredictSettings, context: Context) -> Outcome:
        """Run the network over the images."""
        from micronet.evaluation.predict import predict
        from micronet.runtimes.network import open_network
        from micronet.runtimes.torch import EagerPredictor

        held = context.memory.artifacts.get(config.file)
        network: Network = EagerPredictor(held, config.runtime) if held else open_network(config.file, config.runtime)
        predictions = predict(network, config.images, str(config.file), context.progress)
        summary = [
            {"image": str(each.image), "classes": [ranked._asdict() for ranked in each.classes[: config.top]]}
            for each in predictions
        ]
        return Outcome(predictions, summary)


PREDICT = Predict()
