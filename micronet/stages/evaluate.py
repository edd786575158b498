"""The reports on networks in any runtime: ``evaluate``, ``compare`` and ``predict``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from micronet.core.config import flag, flatten, group, setting
from micronet.core.files import FOLDER, file_size, short_names
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.config import MeasureSettings, ReportConfig, TimingConfig, input_file
from micronet.stages.gates import GateConfig, require, verdicts
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.data.dataset import Dataset, DataSpec
    from micronet.evaluation.accuracy import Evaluation
    from micronet.evaluation.network import Network
    from micronet.evaluation.report import Row

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
        self.runtime.check_files(self.files, several=True)
        from micronet.models.device import describe_machine
        from micronet.stages.compare_latency import describe_noise, describe_speed
        from micronet.stages.comparison_files import write_files

        measured = measure(self.files, self, context, timed=not self.timing.skip_timing)
        rows = measured.rows
        summary: dict[str, Any] = {"machine": describe_machine(), "rows": [row._asdict() for row in rows]}
        files = [file for file, _ in each_runtime(self.files, self.runtime)]
        speed, noise = describe_speed(rows, files, measured.networks), describe_noise(rows)
        summary |= {"words": [*speed, *noise], **_tested(measured.dataset)}
        if found := verdicts(rows, self.gates):
            summary["gates"] = [each._asdict() for each in found]
        write_files(rows, found, csv=self.csv, junit=self.junit)
        if self.html is not None:
            from micronet.stages.comparison_page import write_comparison

            write_comparison(self.html, files, measured, (speed, noise), self.gates.max_drop, context.progress)
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

        network, _ = _open(self.file, self.runtime, context)
        predictions = predict(network, self.images, str(self.file), context.progress)
        summary = [
            {"image": str(each.image), "classes": [ranked._asdict() for ranked in each.classes[: self.top]]}
            for each in predictions
        ]
        return Outcome(predictions, summary)


def _tested(dataset: "Dataset") -> dict[str, str]:
    """Return what the networks were tested on, in words."""
    return {"noun": dataset.test.noun, "tested_on": dataset.tested_on}


class Measured(NamedTuple):
    """What was measured of networks, and on which data."""

    rows: "list[Row]"
    evaluations: "list[Evaluation]"
    networks: "list[Network]"
    dataset: "Dataset"


def measure(files: list[Path], config: MeasureSettings, context: Context, *, timed: bool) -> Measured:
    """Measure networks on the data named, or that the first one remembers.

    Raises:
        MicronetError: A file cannot be opened, the networks take different inputs, or do not score the data's classes.
    """
    from micronet.data.batches import eval_batches
    from micronet.data.memory import NAME as MEMORY
    from micronet.evaluation.accuracy import check_scores
    from micronet.evaluation.report import Candidate, compare
    from micronet.runtimes.torch import EagerPredictor
    from micronet.stages.inputs import open_test_data

    candidates = []
    for file in (each for each in files if each not in context.memory.artifacts and not each.exists()):
        _open(file, config.runtime, context)  # raises, before the others are opened
    opened = each_runtime(files, config.runtime)
    names = short_names(file for file, _ in opened)
    for (file, options), name in zip(opened, names, strict=True):
        network, size_bytes = _open(file, options, context)
        name = file.stem.strip("<>") if file in context.memory.artifacts else name
        candidates.append(Candidate(name, network, size_bytes))
    specs = [each.network.data for each in candidates if each.network.data]
    if config.data.task is None and len(tasks := sorted({spec.task for spec in specs})) > 1:
        raise MicronetError(f"the files are for different tasks ({', '.join(tasks)}); choose one with --task")
    like = _common_spec(specs)
    for each in candidates:
        _check_same_input(each.name, each.network, like)
    models = [each.network.model for each in candidates if isinstance(each.network, EagerPredictor)]
    dataset = open_test_data(config.data, like, next(iter(models), None))
    if dataset.task.needs_reference and len(candidates) == 1:
        given = flatten(config)
        typed = [name for name in ("model", "task", "data") if given.get(name) is not None and given[name] != MEMORY]
        words = [f"{flag(name)} {given[name]}" for name in typed]
        command = " ".join(["micronet compare FLOAT", str(files[0]), *words])
        raise MicronetError(f"--task {dataset.task.name} needs the float original; run {command}")
    for each in candidates:
        if isinstance(each.network, EagerPredictor) and dataset.inputs is not None:
            each.network.take_in_order(dataset.inputs)
    inputs, _ = next(eval_batches(dataset.test, dataset.spec, batch_size=1))
    for (file, _), each in zip(opened, candidates, strict=True):
        check_scores(each.network, inputs, dataset.spec, str(file), dataset.task)
    rows, evaluations = compare(candidates, dataset, context.progress, timed=timed)
    return Measured(rows, evaluations, [each.network for each in candidates], dataset)


def each_runtime(files: list[Path], options: RuntimeOptions) -> list[tuple[Path, RuntimeOptions]]:
    """Return each file with the options to open it by; an ONNX file once per runtime that the options name."""
    return [
        (file, replace(options, runtime=name))
        for file in files
        for name in (options.runtimes if file.suffix == ".onnx" else options.runtimes[:1])
    ]


def _open(file: Path, runtime: RuntimeOptions, context: Context) -> "tuple[Network, int]":
    """Open a network; return it with the size of its file in bytes."""
    from micronet.runtimes.network import open_network

    if file not in context.memory.artifacts:
        return open_network(file, runtime), file_size(file)
    from micronet.artifact.artifact import save
    from micronet.core.files import temporary_folder
    from micronet.models.modes import copy_model
    from micronet.runtimes.torch import EagerPredictor

    held = context.memory.artifacts[file]
    held = replace(held, model=copy_model(held.model))  # the caller's network keeps its mode and device
    with temporary_folder() as folder:
        written = folder / "network.safetensors"
        save(held, written)
        return EagerPredictor(held, runtime), file_size(written)


def _common_spec(specs: "list[DataSpec]") -> "DataSpec":
    """Return what the networks expect of their images: the first one's values, completed by the others'."""
    from micronet.data.dataset import DataSpec

    known: dict[str, Any] = {}
    for spec in specs:
        known = {**{key: value for key, value in spec.to_json().items() if value is not None}, **known}
    return replace(DataSpec(), **known)


def _check_same_input(name: str, network: "Network", like: "DataSpec") -> None:
    """Raise MicronetError if a network expects images prepared in another way than the first."""
    for key in ("image_size", "mean", "std", "inputs"):
        own = getattr(network.data, key, None)
        if own is not None and own != getattr(like, key):
            raise MicronetError(
                f"{name} expects {'' if key == 'inputs' else 'images with '}{key} {own}, but an earlier file expects "
                f"{getattr(like, key)}; evaluate them separately"
            )
