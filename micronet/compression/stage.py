"""The ``compress`` stage: what is needed goes in, the smallest or fastest network that keeps it comes out."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micronet import registry
from micronet.core.config import flag, group, setting
from micronet.errors import FailedError, MicronetError, unknown
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import DataConfig, ReportConfig, TimingConfig, input_file
from micronet.stages.stage import BEFORE_FUSING, Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.compression.goal import Goal

STEM = "network"  # of the files in the folder
TARGETS = ("target_latency", "target_size", "target_macs")
_MINUTES = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?")
_UNITS = {"s": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0, None: 1.0}


@dataclass(frozen=True)
class Compress(Stage):
    """Finds the smallest or fastest network within a drop."""

    name = "compress"
    details = (
        "Makes candidates that differ in channel widths, bits and layers that stay float, measures each in the runtime "
        "and on the validation images, and keeps the best. Each candidate is a recipe; the chosen one's is written as "
        "recipe.toml and gives the same network again. If the command is interrupted, run it again to continue."
    )
    example = "micronet compress float.safetensors --max-drop 1 --minimize latency --budget 30m -o small"
    suffix = None
    product = "Artifact"
    continues = True
    advanced = ("metric", "target_macs", "dry_run")
    cannot_follow = {"quantize": "use the float artifact", "bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    artifact: Path = input_file(
        "A float artifact, or a float .onnx file, which can only be quantized.", kinds=(".safetensors", ".onnx")
    )
    max_drop: float = setting(
        1.0,
        "Largest drop of the metric on the validation images, in points: hundredths of the metric.",
        low=0, high=100, basic=True,
    )  # fmt: skip
    metric: str | None = setting(
        None, "Metric that may drop. Default: the task's main one.", metavar="NAME", basic=True
    )
    minimize: Literal["latency", "size"] | None = setting(
        None, "What to minimize. Default: latency, unless there is a target.", basic=True
    )
    target_latency: float | None = setting(
        None, "Fraction of the float network's latency in the runtime to reach.", low=0.001, high=10, basic=True
    )
    target_size: float | None = setting(
        None, "Fraction of the float network's file size in the runtime to reach.", low=0.001, high=10, basic=True
    )
    target_macs: float | None = setting(
        None, "Fraction of the multiply-accumulates (MACs) to reach.", low=0.001, high=10, basic=True
    )
    runtime: str = setting("onnxruntime", f"Where the network is to run: {', '.join(registry.TARGETS)}.", basic=True)
    batch: int = setting(1, "Samples in a call when networks are timed.", low=1, high=65536)
    threads: int = setting(1, "Number of CPU threads of the runtime.", low=1, high=1024)
    budget: str = setting(
        "60m",
        "Time for the search, for example 90s, 30m or 2h (without a unit: minutes); what does not fit is left out.",
        basic=True,
    )
    no_training: bool = setting(False, "Do not train candidates; calibrate only.", basic=True)
    dry_run: bool = setting(
        False, "Print what would be tried and how long it would take.", run_only=True, api=False, basic=True
    )
    device: str | None = setting(
        None, "Device for training: cpu, cuda or cuda:N; default: cuda if available, otherwise cpu."
    )
    seed: int = setting(1, "Seed for shuffling, augmentation and the validation split.", low=0, high=2**31)
    output: Path | None = setting(
        None, "Folder for the results. Default: the input's name and -small.", "-o", basic=True
    )
    force: bool = setting(
        False, "Start over in a folder that holds another search, or write among other files.", run_only=True
    )
    code: CodeOptions = group(CodeOptions)
    data: DataConfig = group(DataConfig)
    timing: TimingConfig = group(TimingConfig)
    report: ReportConfig = group(ReportConfig)

    def check(self) -> None:
        """Refuse goals that contradict one another, an unknown runtime and an invalid budget."""
        if len(self.goals) > 1:
            raise MicronetError(f"{' and '.join(map(flag, self.goals))} both say what to reach; use one of them")
        if self.runtime not in registry.TARGETS:
            raise unknown("runtime", self.runtime, registry.TARGETS)
        if self.timing.skip_timing and self.quantity == "latency":
            raise MicronetError(
                "--skip-timing measures no latency, which this search is about; drop it, or add --target-size, "
                "--target-macs or --minimize size"
            )
        _ = self.budget_seconds

    @property
    def goals(self) -> list[str]:
        """The settings given that say what to reach."""
        return [name for name in (*TARGETS, "minimize") if getattr(self, name) is not None]

    @property
    def quantity(self) -> Literal["latency", "size", "macs"]:
        """The quantity that is to be small."""
        goal = next(iter(self.goals), "minimize")
        if goal == "minimize":
            return self.minimize or "latency"
        return {"target_latency": "latency", "target_size": "size", "target_macs": "macs"}[goal]  # type: ignore[return-value]

    @property
    def goal(self) -> "Goal":
        """What is asked for."""
        from micronet.compression.goal import Goal

        target = next((getattr(self, name) for name in TARGETS if getattr(self, name) is not None), None)
        return Goal(self.quantity, self.max_drop / 100, target)

    @property
    def budget_seconds(self) -> float:
        """The budget; MicronetError if it is not a time."""
        found = _MINUTES.fullmatch(self.budget.strip())
        if found is None or not 0 < (minutes := float(found[1]) * _UNITS[found[2]]) < 1e6:
            raise MicronetError(f"--budget is {self.budget!r}; expected a time, for example 90s, 30m or 2h")
        return 60 * minutes

    @property
    def folder(self) -> Path:
        """The folder for the results."""
        return self.output or self.artifact.with_name(f"{self.artifact.stem}-small")

    def leaves(self) -> Path | None:
        """Return the chosen network, if it is an artifact."""
        return None if self.artifact.suffix == ".onnx" else self.folder / f"{STEM}.safetensors"

    def records(self) -> list[str]:
        """Return all stages that the chosen network may have gone through; which, only the search knows."""
        return ["prune", "finetune", "quantize", "bn-fuse"]

    def run(self, context: Context) -> Outcome:
        """Search, and write the chosen network, its recipe and the front."""
        from micronet.compression.words import describe_threads

        for line in [] if self.timing.skip_timing else describe_threads(self.threads):
            context.progress.line(line)
        if self.artifact.suffix == ".onnx":
            from micronet.compression.compressing_file import CompressingFile

            return CompressingFile(self, context).run()
        from micronet.compression.compressing import Compressing

        return Compressing(self, context).run()

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError if no candidate reaches the target within the drop."""
        summary: dict[str, Any] = outcome.summary
        if summary.get("miss"):
            raise FailedError(summary["miss"])
