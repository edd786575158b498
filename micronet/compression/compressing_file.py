"""The work of ``compress`` on an ONNX file, which can only be quantized: which layers to leave in float."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from micronet.compression.bits import EXCEPTIONS, slow_times, try_bits
from micronet.compression.compressing import TIMING_SHARE
from micronet.compression.costs import CostTable, Deployment
from micronet.compression.file_layers import file_noise, find_file_layers
from micronet.compression.judge import DataJudge, FeedJudge, Judge
from micronet.compression.keys import open_notes
from micronet.compression.original import measure_original
from micronet.compression.plan import Basis
from micronet.compression.point import Point
from micronet.compression.prediction import Prediction
from micronet.compression.result import conclude
from micronet.compression.stage import Compress
from micronet.compression.words import describe_choice
from micronet.compression.workshop import Workshop
from micronet.core.config import flatten
from micronet.errors import MicronetError
from micronet.evaluation.network import Network, Predictor
from micronet.onnx import posttraining
from micronet.onnx.feeds import Feed, ImageInput
from micronet.onnx.reader import read_onnx
from micronet.quantization.config import INTEGER_BITS, CalibrationConfig
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.runtimes.onnxruntime import open_session
from micronet.stages.float_model import FloatModel
from micronet.stages.onnx_files import is_raw
from micronet.stages.onnx_ranges import CALIBRATORS
from micronet.stages.quantize_onnx import calibration_feeds
from micronet.stages.stage import Context, Outcome

RUNTIMES = ("onnxruntime", "openvino")
NOISE_RUNS = 4  # of the calibration inputs, for the noise of layers alone


class CompressingFile:
    """One search for an ONNX file."""

    def __init__(self, settings: Compress, context: Context) -> None:
        self.settings, self.progress, self.goal = settings, context.progress, settings.goal
        if self.goal.quantity == "macs":
            raise MicronetError("an ONNX file is only quantized, which changes no MACs; use --target-latency or -size")
        if settings.runtime not in RUNTIMES:
            raise MicronetError(f"ONNX files run in {' or '.join(RUNTIMES)}, not in {settings.runtime}")
        if not settings.no_training:
            self.progress.line(
                "an ONNX file cannot be trained or pruned: only its bits are chosen, as with --no-training"
            )
        self.model = FloatModel(read_onnx(settings.artifact), settings.artifact, settings.data, settings.seed)
        self.folded = posttraining.prepare(self.model.proto)

    @cached_property
    def feeds(self) -> list[Feed]:
        """The inputs to calibrate on."""
        return calibration_feeds(self.model, CalibrationConfig(mode="ptq"), self.progress)

    @cached_property
    def judge(self) -> Judge:
        """The task of the data set if the file suits it; otherwise, how close a candidate is to the file."""
        named, metric = self.settings.data.data, self.settings.metric
        if self.model.has_data and not (named and is_raw(named)):
            data = self.model.open_data()
            image = self.model.image_input(data.spec)
            judge = _FileJudge(data, metric, lambda network: _on_images(network, image))
            judge.feed = self.feeds[0]
            try:
                judge.check(open_network(self.settings.artifact, RuntimeOptions()), str(self.settings.artifact))
            except MicronetError:
                if self.settings.data.task is not None:
                    raise
            else:
                if not data.task.needs_reference:
                    return judge
        session = open_session(self.settings.artifact, RuntimeOptions(), str(self.settings.artifact))
        return FeedJudge(self.feeds, lambda feed: session.run(None, feed), metric)

    @cached_property
    def workshop(self) -> Workshop:
        """Where candidates are made."""
        settings = self.settings
        given = {**flatten(settings.data), "seed": settings.seed}
        options = {name: value for name, value in given.items() if value is not None}
        basis = Basis(settings.artifact, {**options, "skip_timing": True}, {}, settings.runtime)
        deployment = Deployment(settings.runtime, settings.batch, settings.threads)
        timed = not settings.timing.skip_timing
        notes, budget = open_notes(settings, deployment, {"name": self.model.data_name}), settings.budget_seconds
        return Workshop(basis, settings.folder, notes, self.judge, deployment, self.progress, budget, timed)

    def run(self) -> Outcome:
        """Search; return the chosen file's model and what was found."""
        if self.settings.dry_run:
            return Outcome(None, {"plan": self._outline()})
        layers, workshop, table = find_file_layers(self.folded, self.feeds[0]), self.workshop, None
        if self.goal.quantity == "latency":
            seconds = TIMING_SHARE * self.settings.budget_seconds
            table = CostTable.open(workshop.deployment, workshop.folder, seconds, workshop.progress)
        prediction = Prediction(self.goal.quantity, layers, {}, table)
        measure_original(workshop, self.settings)
        try_bits(workshop, prediction, self.goal.max_drop, self._alone)

        def describe(point: Point) -> list[str]:
            known = {INTEGER_BITS: self._alone()} if "layers in integers" in workshop.notes.found else {}
            return describe_choice(point, [], known, slow_times(workshop, prediction, point.plan))

        summary = conclude(workshop, self.goal, describe)
        return Outcome(read_onnx(Path(summary["files"]["deployed"])), summary)

    def _alone(self) -> dict[str, dict[str, float]]:
        """Return what each layer costs if it alone is quantized."""

        def measure() -> dict[str, dict[str, float]]:
            histograms = posttraining.collect(self.folded, self.feeds, signed=False)
            ranges = posttraining.find_ranges(histograms, CALIBRATORS[0], 100.0, signed=False)
            return file_noise(self.folded, ranges, self.feeds[:NOISE_RUNS], self.workshop.progress)

        found: dict[str, dict[str, float]] = self.workshop.notes.once("layers in integers", measure)
        return found

    def _outline(self) -> list[str]:
        number = len(find_file_layers(self.folded, self.feeds[0]))
        faster = "with the layers in float that are faster so; " if self.goal.quantity == "latency" else ""
        return [
            f"{number} layers of {self.settings.artifact} may be quantized; nothing is trained or pruned",
            f"tried: int8; {faster}if int8 loses more than the drop, with the {', '.join(map(str, EXCEPTIONS))} most "
            "sensitive layers in float",
        ]


class _FileJudge(DataJudge):
    """Judges an ONNX file by a data set; it is timed on its own kind of input."""

    feed: Feed

    def sample(self) -> Any:
        """Return the first input as an array."""
        return next(iter(self.feed.values()))[:1]


def _on_images(network: Network, image: ImageInput) -> Predictor:
    """Return a predictor on normalized images for a network that may take another layout, type or batch size."""

    def run(feed: Feed) -> Sequence[Any]:
        outputs = network(next(iter(feed.values())))
        return outputs if isinstance(outputs, list) else [outputs]

    return partial(image.predict, run)
