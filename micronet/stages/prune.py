"""The ``prune`` stage: channels are cut out of the weights, so the network really is smaller and faster."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import flag, group, setting
from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.stages.config import ConvertSettings, RunConfig
from micronet.stages.stage import BEFORE_FUSING, PRUNE_FIRST, Context, Outcome, Stage
from micronet.stages.train import FINETUNING, run_context, trained
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from micronet.artifact.history import StageRecord


@dataclass(frozen=True)
class PruneSettings(ConvertSettings):
    """The settings of ``prune``."""

    dry_run: bool = setting(False, "Print the plan without writing anything.", run_only=True, api=False, basic=True)
    measure: bool = setting(
        False, "Measure latency in ONNX Runtime, and accuracy before any training.", api=False, basic=True
    )
    steps: int = setting(
        0, "Prune in N steps, with training after each (--epochs, --lr, ...).", low=0, high=1000, metavar="N"
    )
    sensitivity: bool = setting(
        False, "Cut each group of channels alone and print the accuracy lost.", run_only=True, api=False
    )
    plot: Path | None = setting(
        None, "Draw the sensitivity into this .png or .svg (needs matplotlib).", run_only=True, api=False, place="file"
    )
    input_shape: str | None = setting(
        None, "Shape of an image if no data set is known. Default: 3,224,224.", metavar="C,H,W"
    )
    pruning: PruneConfig = group(PruneConfig)
    training: TrainConfig = group(FINETUNING)
    run: RunConfig = group(RunConfig)


class Prune(Stage):
    """Cuts channels."""

    name = "prune"
    details = (
        "It cuts floor(percent * channels) of the prunable channels, unless --regular or grouped layers need other "
        "widths. With --steps, all steps together cut that share, to within one channel per step."
    )
    example = "micronet prune sparse.safetensors --percent 0.5 --regular 8 -o pruned.safetensors"
    Config = PruneSettings
    ending = "-pruned.safetensors"
    takes_batches = True
    takes_example = True
    advanced = ("epochs", "lr", "batch_size")
    cannot_follow = {"quantize": PRUNE_FIRST, "bn-fuse": BEFORE_FUSING}  # noqa: RUF012  # never changed

    def check(self, config: PruneSettings) -> None:
        """Refuse settings that have no effect together."""
        if config.steps and (config.dry_run or config.sensitivity):
            raise MicronetError("--steps trains; leave it out with --dry-run and --sensitivity")
        if config.measure and (config.steps or config.sensitivity):
            raise MicronetError("--measure needs a single cut; leave it out with --steps and --sensitivity")
        if config.plot is not None and not config.sensitivity:
            raise MicronetError("--plot draws the result of --sensitivity; add that")
        if config.sensitivity and config.pruning.goals:
            raise MicronetError(f"--sensitivity cuts fixed shares; leave {flag(config.pruning.goals[0])} out")
        if config.steps:
            return
        if config.training != FINETUNING:
            raise MicronetError("prune trains only between steps; add --steps 1, or run micronet finetune afterwards")
        for item in fields(RunConfig):
            if item.name not in ("seed", "device") and getattr(config.run, item.name) != item.default:
                raise MicronetError(f"{flag(item.name)} is for training; add --steps N, or leave it out")

    def trains(self, config: PruneSettings) -> bool:
        """Return True if there is training between steps."""
        return config.steps > 0

    def records(self, config: Any) -> list[str]:
        """Return the stages of every step."""
        return ["prune", "finetune"] * config.steps or ["prune"]

    def writes(self, config: PruneSettings) -> str | None:
        """Return no suffix if only a plan or the sensitivity is printed."""
        return None if config.dry_run or config.sensitivity else ".safetensors"

    def run(self, config: PruneSettings, context: Context) -> Outcome:
        """Prune once or in steps, or measure the sensitivity of the groups."""
        from micronet.stages.inputs import example_input
        from micronet.stages.prune_network import Pruning

        run, memory = run_context(config, context), context.memory
        example = memory.batches[0] if memory.example is None and memory.batches else memory.example
        if example is None:
            example = example_input(context.artifact, config.input_shape)
        pruning = Pruning(context.artifact, config, example, run)
        if config.sensitivity:
            rows = pruning.sensitivity()
            if config.plot is not None:
                from micronet.pruning.sensitivity import draw

                draw(rows, config.plot)
            return Outcome(rows, [row._asdict() for row in rows])
        if config.steps:
            return trained(pruning.in_steps())
        pruned, plan = pruning.once()
        return Outcome(pruned, pruning.summary(pruned, plan, self.input(config)))

    def add_file(self, summary: dict[str, Any], path: Path) -> None:
        """Add the file, and its size to the figures after pruning."""
        super().add_file(summary, path)
        summary.get("after", {}).update(size_bytes=path.stat().st_size)

    def restore(self, model: "nn.Module", record: "StageRecord") -> "nn.Module":
        """Resize the layers as recorded."""
        from micronet.pruning.prune import restore

        return restore(model, record)


PRUNE = Prune()
