"""``micronet prune``: channels are cut out of the weights, so that the network is smaller and faster for real."""

from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.options import Input, OutputOptions, default_name, with_configs
from micronet.pruning.config import PruneConfig
from micronet.runtime.options import CodeOptions

NAME = "prune"
EXAMPLE = "micronet prune sparse.safetensors --percent 0.5 --regular 8 -o pruned.safetensors"


@with_configs
def run(
    artifact: Input,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of an image, where no data set is known. Default: 3,224,224.")
    ] = None,
    *,
    pruning: PruneConfig,
    code: CodeOptions,
    output: OutputOptions,
) -> None:
    """Cut the channels whose batch-norm scales are smallest, over the whole network, and carry the rest's weights over.

    Exactly floor(percent * channels) go, where neither --regular nor grouped convolutions ask for other widths.
    """
    from micronet.artifact import save
    from micronet.cli import stages
    from micronet.files import check_target
    from micronet.pruning.prune import prune_model

    path = output.output or default_name(artifact, "-pruned.safetensors")
    if not dry_run:
        check_target(path, output.force)
    opened = stages.open_artifact(artifact, code, NAME)
    example = stages.example_input(opened, input_shape)
    model, record, plan = prune_model(opened.model, pruning, example)
    pruned = opened.after(record, model=model, metrics={})
    summary: dict[str, Any] = {
        "asked": plan.asked,
        "cut": plan.cut,
        "total": plan.total,
        "before": {**stages.sizes(opened), "size_bytes": artifact.stat().st_size},
        "after": stages.sizes(pruned),
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


def _print(summary: dict[str, Any]) -> None:
    rows = [
        (", ".join(group["layers"]), str(group["before"]), str(group["after"]), group["note"])
        for group in summary["groups"]
    ]
    console.print_table(("layers", "before", "after", "note"), rows)
    wanted = "" if summary["asked"] == summary["cut"] else f" ({summary['asked']:,} asked for)"
    console.print_line(f"channels  {summary['cut']:,} of {summary['total']:,} cut{wanted}")
    for label, key in (("params", "params"), ("MACs", "macs"), ("bytes", "size_bytes")):
        before, after = summary["before"].get(key), summary["after"].get(key)
        if before and after:
            console.print_line(f"{label:<10}{before:,} -> {after:,}  ({1 - after / before:.1%} less)")
    if "output" in summary:
        console.print_line(f"wrote {summary['output']}  go on with: micronet finetune {summary['output']}")
