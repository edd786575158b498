"""The ``prune`` stage: channels are cut out of the weights, so the network really is smaller and faster."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import flag, group, setting
from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.stages.config import ConvertSettings, RunConfig, TimingConfig, check_teacher
from micronet.stages.stage import BEFORE_FUSING, PRUNE_FIRST, Context, Outcome, Purpose, Stage
from micronet.stages.train import FINETUNING, run_context, trained
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.pruning.plan import PrunePlan

LARGEST_TIMED = 200_000_000  # parameters; exporting and timing more would take minutes


@dataclass(frozen=True)
class Prune(ConvertSettings, Stage):
    """Cuts channels."""

    name = "prune"
    details = (
        "Removes floor(percent * channels) of the prunable channels, unless --regular or grouped layers require "
        "other widths. With --steps, all steps together remove that fraction, to within one channel per step."
    )
    example = "micronet prune sparse.safetensors --percent 0.5 --regular 8 -o pruned.safetensors"
    ending = "-pruned.safetensors"
    leads_to = "finetune"
    restorer = "micronet.pruning.prune:restore"
    takes_example = True
    advanced = ("preset", "epochs", "lr", "batch_size")
    cannot_follow = {"quantize": PRUNE_FIRST, "bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    dry_run: bool = setting(False, "Print the plan without writing anything.", run_only=True, api=False, basic=True)
    measure: bool = setting(
        False,
        "Also measure the accuracy before and after, without further training, and fail if the latency cannot be "
        "measured.",
        api=False,
        basic=True,
    )
    steps: int = setting(
        0, "Prune in N steps and train after each one (--epochs, --lr, ...).", low=0, high=1000, metavar="N"
    )
    sensitivity: bool = setting(
        False, "Prune one group of channels at a time and print the accuracy drop.", run_only=True, api=False
    )
    plot: Path | None = setting(
        None,
        "Save a plot of the sensitivity as a .png or .svg file (needs matplotlib).",
        run_only=True,
        api=False,
        place="file",
    )
    input_shape: str | None = setting(None, "Input shape if no data set is known. Default: 3,224,224.", metavar="C,H,W")
    timing: TimingConfig = group(TimingConfig)
    pruning: PruneConfig = group(PruneConfig)
    training: TrainConfig = group(FINETUNING)
    execution: RunConfig = group(RunConfig)

    def check(self) -> None:
        """Refuse settings that have no effect together."""
        if self.steps and (self.dry_run or self.sensitivity):
            raise MicronetError(
                "--steps trains, so it cannot be combined with --dry-run or --sensitivity; drop one of them"
            )
        if self.measure and (self.steps or self.sensitivity):
            raise MicronetError("--measure cannot be combined with --steps or --sensitivity; drop one of them")
        if self.measure and self.timing.skip_timing:
            raise MicronetError("--measure times the networks, and --skip-timing does not; drop one of them")
        if self.plot is not None and not self.sensitivity:
            raise MicronetError("--plot needs --sensitivity; add it")
        if self.sensitivity and self.pruning.goals:
            raise MicronetError(
                f"--sensitivity removes fixed fractions of the channels; drop {flag(self.pruning.goals[0])}"
            )
        check_teacher(self.training)
        if self.steps:
            return
        if self.training != FINETUNING:
            raise MicronetError("prune only trains between steps; add --steps 1, or run micronet finetune afterwards")
        for item in fields(RunConfig):
            if item.name not in ("seed", "device") and getattr(self.execution, item.name) != item.default:
                raise MicronetError(
                    f"{flag(item.name)} only applies to training; add --steps N, or drop {flag(item.name)}"
                )

    def trains(self) -> bool:
        """Return True if there is training between steps."""
        return self.steps > 0

    def needs_data(self) -> bool:
        """Return True if there is training between steps."""
        return self.steps > 0

    def records(self) -> list[str]:
        """Return the stages of every step."""
        return ["prune", "finetune"] * self.steps or ["prune"]

    def writes(self) -> str | None:
        """Return no suffix if only a plan or the sensitivity is printed."""
        return None if self.dry_run or self.sensitivity else ".safetensors"

    def plain_weights(self) -> Purpose:
        """Return "pruning": channels are cut from them, and a training may follow."""
        return "pruning"

    def run(self, context: Context) -> Outcome:
        """Prune once or in steps, or measure the sensitivity of the groups."""
        from micronet.stages.prune_example import pruning_example
        from micronet.stages.prune_network import Pruning

        run, memory = run_context(self, context), context.memory
        example = memory.example
        if example is None:
            example = pruning_example(context.artifact, self.data, self.input_shape)
        pruning = Pruning(context.artifact, self, example, run)
        if self.sensitivity:
            rows, metric = pruning.sensitivity(), pruning.data.task.main
            if self.plot is not None:
                from micronet.pruning.sensitivity import draw

                draw(rows, self.plot, metric)
            return Outcome(rows, [{**row._asdict(), "metric": metric} for row in rows])
        if self.steps:
            done = trained(made := pruning.in_steps())
            done.summary.update(pruning.sizes(made, self.input()))
            return done
        pruned, plan = pruning.once()
        summary = pruning.summary(pruned, plan, self.input())
        if self.measure or not (self.timing.skip_timing or context.temporary or memory.source is not None):
            summary["latency"] = latency = self._latency(context, pruned, plan, example)
            if self.measure:
                for when in ("before", "after"):
                    summary[when]["latency_ms"] = latency[f"{when}_ms"]
        return Outcome(pruned, summary)

    def _latency(self, context: Context, pruned: "Artifact", plan: "PrunePlan", example: Any) -> dict[str, Any]:
        """Time a network before and after; MicronetError if it was asked for and is impossible."""
        from micronet.stages.prune_latency import measure_latency

        whole = context.artifact
        params = sum(parameter.numel() for parameter in whole.model.parameters())
        if params > LARGEST_TIMED and not self.measure:
            return {"skipped": f"more than {LARGEST_TIMED:,} parameters"}
        latency = measure_latency(whole, pruned, self.pruning, example, plan.channels.network, context.progress)
        if self.measure and "skipped" in latency:
            raise MicronetError(f"the latency cannot be measured: {latency['skipped']}; drop --measure")
        return latency

    def next_stage(self, product: "Artifact") -> str | None:
        """Return what trains the network; without labels, that needs the network before pruning as a teacher."""
        from micronet.data.dataset import DataSpec
        from micronet.tasks.agreement import Agreement

        following, source = super().next_stage(product), self.input()
        if following is None or source is None or DataSpec.from_json(product.data).task != Agreement.name:
            return following
        return f"{following} --distill {source}"

    def add_file(self, summary: dict[str, Any], path: Path) -> None:
        """Add the file, and its size to the figures after pruning."""
        super().add_file(summary, path)
        summary.get("after", {}).update(size_bytes=path.stat().st_size)
