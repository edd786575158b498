"""The ``plot`` stage: training curves, histograms of a network, and networks by quality and cost, as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from micronet.core.config import group, setting
from micronet.errors import MicronetError, count
from micronet.stages.config import MeasureSettings, TimingConfig
from micronet.stages.report import networks_in, require_all
from micronet.stages.stage import Context, Outcome, Stage

MOST_PANELS = 64
BATCH, BATCHES = 64, 4


@dataclass(frozen=True, kw_only=True)
class Plot(MeasureSettings, Stage):
    """Draws trainings and networks."""

    name = "plot"
    details = (
        "Curves come from the .metrics.jsonl files that trainings write beside their artifacts, even while they run. "
        "Histograms of quantized layers are in steps of their grid; its levels, or its ends if there are many, are "
        "lines. The networks of a Pareto chart are measured on the test images, as micronet compare does."
    )
    example = "micronet plot float.safetensors int8.safetensors -o curves.png"
    suffix = None
    product = "list[Path]"
    advanced = ("runtime", "device", "threads")
    takes_networks = False

    files: list[Path] = setting(
        help="Artifacts, or folders of them; for pareto, any networks. For histograms, a single artifact.",
        argument=True,
        metavar="RUN...",
    )
    output: Path | None = setting(
        None, "The .png, .svg or .pdf file to write. Default: curves.png, weights.png, activations.png or pareto.png.",
        "-o", basic=True, place="file",
    )  # fmt: skip
    what: Literal["curves", "weights", "activations", "pareto"] = setting(
        "curves",
        "Loss and metrics by epoch, histograms of a network's weights or activations, or the main metric over latency "
        "and size.",
        basic=True,
    )
    timing: TimingConfig = group(TimingConfig)

    def check(self) -> None:
        """Refuse several networks where one is drawn."""
        if self.what in ("weights", "activations") and len(self.files) != 1:
            raise MicronetError(f"--what {self.what} draws one artifact; got {len(self.files)}")

    def run(self, context: Context) -> Outcome:
        """Draw the picture."""
        path = self.output or Path(f"{self.what}.png")
        summary: dict[str, Any] = {"output": str(path), "drawn": [], "hidden": [], "left_out": {}}
        if self.what == "pareto":
            summary |= self._pareto(path, context)
        else:
            summary["drawn"] = self._curves(path) if self.what == "curves" else self._histograms(path, context)
        return Outcome([path], summary)

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError that names the networks that are not in the picture, after it was drawn."""
        require_all(outcome.summary["left_out"])

    def _pareto(self, path: Path, context: Context) -> dict[str, Any]:
        from micronet.reporting.pareto import draw, trade_offs
        from micronet.stages.measure import measure

        files = [each for file in self.files for each in networks_in(file, self.runtime, context.progress)]
        left_out: dict[str, str] = {}
        measured = measure(files, self, context, timed=not self.timing.skip_timing, left_out=left_out)
        found = trade_offs(measured.rows, measured.dataset.task)
        if not found:
            got = count(len(measured.rows), "network")
            said = (
                f"got {got}" if len(measured.rows) < 2 else f"fewer than two of {got} have a finite metric; name others"
            )
            raise MicronetError(f"--what pareto compares networks; {said}")
        draw(found, path)
        drawn = list(dict.fromkeys(point.name for each in found for point in each.points))
        hidden = list(dict.fromkeys(name for each in found for name in each.hidden if name not in drawn))
        if hidden:
            context.progress.line(f"not drawn, because they are far less accurate: {', '.join(hidden)}")
        return {"drawn": drawn, "hidden": hidden, "left_out": left_out}

    def _curves(self, path: Path) -> list[str]:
        from micronet.reporting.curves import ENDING, draw, read_metrics

        runs = [each for file in self.files for each in (sorted(file.glob(f"*{ENDING}")) if file.is_dir() else [file])]
        found = read_metrics(runs)
        if not found:
            raise MicronetError(
                f"{self.files[0]} has no {ENDING} file beside it or in it; trainings write one at the end of each epoch"
            )
        draw(found, path)
        return sorted({name for series in found.values() for name in series})

    def _histograms(self, path: Path, context: Context) -> list[str]:
        from micronet.artifact.artifact import load
        from micronet.reporting.histograms import activation_panels, draw, weight_panels

        artifact = load(self.files[0], self.runtime.model, trust_code=self.runtime.trust_code)
        panels = weight_panels(artifact.model) if self.what == "weights" else activation_panels(
            artifact.model, self._batches(artifact)
        )  # fmt: skip
        if not panels:
            why = "no layers with weights" if self.what == "weights" else "no quantized activations"
            raise MicronetError(f"{self.files[0]} has {why}; quantize it with micronet quantize")
        if len(panels) > MOST_PANELS:
            context.progress.line(f"drew the first {MOST_PANELS} of {len(panels)} layers")
        draw(panels[:MOST_PANELS], path)
        return [panel.title for panel in panels[:MOST_PANELS]]

    def _batches(self, artifact: Any) -> list[Any]:
        from itertools import islice

        from micronet.data.batches import eval_batches
        from micronet.stages.inputs import open_data

        dataset = open_data(self.data, artifact)
        batches = eval_batches(dataset.validation, dataset.spec, batch_size=BATCH)
        return [inputs for inputs, _ in islice(batches, BATCHES)]
