"""The reports on networks in any runtime: ``evaluate``, ``compare`` and ``predict``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.core.files import FOLDER
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.config import MeasureSettings, ReportConfig, TimingConfig, input_file
from micronet.stages.gates import GateConfig, require, verdicts
from micronet.stages.measure import each_runtime, measure, open_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.data.dataset import Dataset

NETWORKS = (".safetensors", ".onnx", ".packed", ".engine", FOLDER)
RELATIVE = ("drop", "agreement", "compression")  # figures that need a second network
NETWORK_FILE = "An artifact, an .onnx, .packed or .engine file, or a folder from export."


@dataclass(frozen=True, kw_only=True)
class Evaluate(MeasureSettings, Stage):
    """Evaluates a network."""

    name = "evaluate"
    details = "Evaluates on the test images; latency is measured for batches of 1 and 64 images."
    example = "micronet evaluate int8.onnx --json"
    suffix = None
    product = "Row"

    file: Path = input_file(NETWORK_FILE, kinds=NETWORKS, metavar="FILE")
    timing: TimingConfig = group(TimingConfig)

    def run(self, context: Context) -> Outcome:
        """Measure the network on the test images."""
        self.runtime.check_files([self.file])
        measured = measure([self.file], self, context, timed=not self.timing.skip_timing)
        [row] = measured.rows
        summary = {key: value for key, value in row._asdict().items() if key not in RELATIVE}
        return Outcome(row, {**summary, **_tested(measured.dataset)})


@dataclass(frozen=True, kw_only=True)
class Compare(MeasureSettings, Stage):
    """Compares networks."""

    name = "compare"
    details = (
        "The first network is the reference. Latencies are measured on this machine, alternating between the "
        "networks. Sizes are file sizes; artifacts store float weights for further training, so quantization only "
        "reduces the size of exported files. The gates, --max-drop and others, judge every network but the first."
    )
    example = "micronet compare float.safetensors int8.safetensors int8.onnx"
    advanced = ("threads", "device")
    suffix = None
    product = "list[Row]"

    files: list[Path] = setting(
        help="Artifacts, .onnx, .packed and .engine files, and folders from export.",
        argument=True,
        kinds=NETWORKS,
        metavar="FILE...",
    )
    timing: TimingConfig = group(TimingConfig)
    markdown: bool = setting(False, "Print the table in Markdown.", api=False, run_only=True, basic=True)
    html: Path | None = setting(
        None,
        "Also write a page that says which network to ship, with charts, layers and the images they disagree on.",
        basic=True,
        metavar="FILE",
        place="file",
    )
    csv: Path | None = setting(None, "Also write the rows to this file, as CSV.", metavar="FILE", place="file")
    junit: Path | None = setting(
        None,
        "Also write what the gates say to this file, as JUnit XML: a test case for each network and gate.",
        metavar="FILE",
        place="file",
    )
    gates: GateConfig = group(GateConfig)

    def check(self) -> None:
        """Refuse gates that have nothing to judge, and a report of no gates."""
        self.gates.check(len(each_runtime(self.files, self.runtime)), timed=not self.timing.skip_timing)
        if self.junit is not None and self.gates == GateConfig():
            raise MicronetError("--junit reports on gates, and none is set; add one, for example --max-drop 1")

    def run(self, context: Context) -> Outcome:
        """Measure every network on the test images."""
        return self.compare(context)

    def compare(self, context: Context, left_out: dict[str, str] | None = None) -> Outcome:
        """Measure every network on the test images; ``left_out``: see ``measure``."""
        self.runtime.check_files(self.files, several=True)
        from micronet.models.device import describe_machine
        from micronet.stages.compare_latency import describe_noise, describe_speed
        from micronet.stages.comparison_files import write_files

        measured = measure(self.files, self, context, timed=not self.timing.skip_timing, left_out=left_out)
        rows = measured.rows
        summary: dict[str, Any] = {"machine": describe_machine(), "rows": [row._asdict() for row in rows]}
        speed, noise = describe_speed(rows, measured.files, measured.networks), describe_noise(rows)
        summary |= {"words": [*speed, *noise], **_tested(measured.dataset)}
        if found := verdicts(rows, self.gates):
            summary["gates"] = [each._asdict() for each in found]
        write_files(rows, found, csv=self.csv, junit=self.junit)
        if self.html is not None:
            from micronet.stages.comparison_page import Words, write_comparison

            words = Words(speed, noise, left_out or {})
            write_comparison(self.html, measured, words, self.gates.max_drop, context.progress)
            summary["html"] = str(self.html)
        return Outcome(rows, summary)

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError that names the network and the figure if a gate fails."""
        require(verdicts(outcome.product, self.gates))


@dataclass(frozen=True)
class Predict(Stage):
    """Classifies image files."""

    name = "predict"
    example = "micronet predict int8.onnx photo.png --top 3"
    suffix = None
    product = "list[Prediction]"

    file: Path = input_file(NETWORK_FILE, kinds=NETWORKS, metavar="NETWORK")
    images: list[Path] = setting(help="Image files, or folders of images.", argument=True, metavar="IMAGE...")
    top: int = setting(5, "Number of classes to list per image.", low=1, basic=True)
    runtime: RuntimeOptions = group(RuntimeOptions)
    report: ReportConfig = group(ReportConfig)

    def run(self, context: Context) -> Outcome:
        """Run the network over the images."""
        self.runtime.check_files([self.file])
        from micronet.evaluation.predict import predict

        network, _ = open_file(self.file, self.runtime, context)
        predictions = predict(network, self.images, str(self.file), context.progress)
        summary = [
            {"image": str(each.image), "classes": [ranked._asdict() for ranked in each.classes[: self.top]]}
            for each in predictions
        ]
        return Outcome(predictions, summary)


def _tested(dataset: "Dataset") -> dict[str, str]:
    """Return what the networks were tested on, in words."""
    return {"noun": dataset.test.noun, "tested_on": dataset.tested_on}
