"""``micronet prune``: channels are cut out of the weights, so that the network is smaller and faster for real."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.finetune import TUNING
from micronet.cli.options import DataOptions, Input, OutputOptions, RunConfig, default_name, with_configs
from micronet.core.config import flag
from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.runtimes.config import CodeOptions
from micronet.training.config import TrainConfig

DATA_ARE_OPTIONAL = True  # only measuring and training between steps read them
EXAMPLE = "micronet prune sparse.safetensors --percent 0.5 --regular 8 -o pruned.safetensors"


@with_configs
def run(
    artifact: Input,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure latency in ONNX Runtime, and accuracy before any training.")
    ] = False,
    steps: Annotated[
        int, typer.Option(help="Prune so many times, each a part of it, and train after each (--epochs, --lr, ...).")
    ] = 0,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Cut each group of channels alone and print what that costs.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the sensitivity into this .png or .svg (needs matplotlib).")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of an image, where no data set is known. Default: 3,224,224.")
    ] = None,
    *,
    pruning: PruneConfig,
    training: TrainConfig = TUNING,
    data: DataOptions,
    code: CodeOptions,
    running: RunConfig,
    output: OutputOptions,
) -> None:
    """Cut the channels that matter least and carry the rest's weights over.

    Of the channels that may be cut floor(percent * channels) go, where neither --regular nor the network's grouped
    layers ask for other widths; with --steps, that share in all to within a channel a step.
    """
    from micronet.artifact.artifact import save
    from micronet.cli import prune_stage, stages
    from micronet.core.files import check_output_path, check_writable

    check_writable(plot)
    _check(steps, sensitivity, dry_run, measure, plot, training)
    if sensitivity and pruning.goals:
        raise MicronetError(f"--sensitivity cuts shares of its own; leave {flag(pruning.goals[0])} out")
    path = output.output or default_name(artifact, "-pruned.safetensors")
    if not dry_run and not sensitivity:
        check_output_path(path, output.force)
    with console.progress(output.quiet) as progress:
        job = stages.make_run(path, running, output, progress)
        opened = stages.open_artifact(artifact, code, "prune")
        known = data.data is not None or stages.image_shape(opened) is not None
        open_data = partial(stages.open_data, data, opened, job.seed) if known else None
        task = prune_stage.Task(opened, stages.example_input(opened, input_shape), open_data, code)
        if sensitivity:
            _print_sensitivity(prune_stage.sensitivity(task, pruning, job), plot, output.json)
            return
        if steps:
            pruned = prune_stage.prune_in_steps(task, pruning, steps, training, job)
            stages.keep(pruned, path)
            stages.report(pruned, path, output)
            return
        pruned, plan = prune_stage.prune(task, pruning, job.seed)
        measured: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        if measure:
            measured = prune_stage.gains(opened, pruned, task)
    summary: dict[str, Any] = {
        "asked": plan.asked,
        "cut": plan.cut,
        "total": plan.total,
        "before": {**stages.sizes(opened.model, task.example), "size_bytes": artifact.stat().st_size, **measured[0]},
        "after": {**stages.sizes(pruned.model, task.example), **measured[1]},
        "groups": [
            {"layers": group.layers, "before": group.before, "after": group.after, "note": group.note}
            for group in plan.groups.values()
        ],
    }
    if not dry_run:
        save(pruned, path)
        summary["after"]["size_bytes"] = path.stat().st_size
        summary = {"output": str(path), **summary}
    if output.json:
        console.print_json(summary)
    elif not output.quiet:
        _print(summary)


def _check(
    steps: int, sensitivity: bool, dry_run: bool, measure: bool, plot: Path | None, training: TrainConfig
) -> None:
    """Raise MicronetError for options that have no use beside one another."""
    if steps < 0:
        raise MicronetError(f"--steps is {steps}; allowed: 1 or more, each with training after it")
    if steps and (dry_run or sensitivity):
        raise MicronetError("--steps trains; leave it out with --dry-run and --sensitivity")
    if measure and (steps or sensitivity):
        raise MicronetError("--measure is of one cut; leave it out with --steps and --sensitivity")
    if plot is not None and not sensitivity:
        raise MicronetError("--plot draws what --sensitivity measures; add that")
    if training != TUNING and not steps:
        raise MicronetError("prune alone trains nothing; add --steps 1, or go on with micronet finetune")


def _print(summary: dict[str, Any]) -> None:
    rows = [
        (", ".join(group["layers"]), str(group["before"]), str(group["after"]), group["note"])
        for group in summary["groups"]
    ]
    console.print_table(("layers", "before", "after", "note"), rows)
    wanted = "" if summary["asked"] in (0, summary["cut"]) else f" ({summary['asked']:,} asked for)"
    console.print_line(f"channels  {summary['cut']:,} of {summary['total']:,} cut{wanted}")
    for label, key in (("params", "params"), ("MACs", "macs"), ("bytes", "size_bytes")):
        before, after = summary["before"].get(key), summary["after"].get(key)
        if before and after:
            console.print_line(f"{label:<10}{before:,} -> {after:,}  ({_change(before, after)})")
    before, after = summary["before"], summary["after"]
    if "latency_ms" in after:
        was, now = before["latency_ms"], after["latency_ms"]
        console.print_line(f"latency   {was:.2f} -> {now:.2f} ms  (one image, ONNX Runtime; {_change(was, now)})")
    if "test_accuracy" in after:
        was, now = before["test_accuracy"], after["test_accuracy"]
        console.print_line(f"accuracy  {was:.2%} -> {now:.2%}  before any training")
    if "output" in summary:
        console.print_line(f"wrote {summary['output']}  go on with: micronet finetune {summary['output']}")


def _change(before: float, after: float) -> str:
    return f"{abs(1 - after / before):.1%} {'more' if after > before else 'less'}"


def _print_sensitivity(rows: list[Any], plot: Path | None, json: bool) -> None:
    from micronet.cli.prune_stage import draw_sensitivity
    from micronet.pruning.sensitivity import SHARES

    if plot is not None:
        draw_sensitivity(rows, plot)
    if json:
        console.print_json([row._asdict() for row in rows])
        return
    shown = [
        (
            ", ".join(row.layers),
            str(row.channels),
            *(f"{100 * row.drops[share]:+.2f} pt" if share in row.drops else "-" for share in SHARES),
        )
        for row in rows
    ]
    console.print_table(("layers", "channels", *(f"{share:.0%} cut" for share in SHARES)), shown)
