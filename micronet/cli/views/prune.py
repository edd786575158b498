"""The result of ``prune``: what was cut, or how sensitive each group of channels is."""

from typing import Any

from micronet.cli import console
from micronet.cli.views import written


def show(summary: Any, config: Any) -> None:
    """Print the plan with sizes before and after, the sensitivity, or the trained result."""
    if isinstance(summary, list):
        _show_sensitivity(summary)
    elif "groups" in summary:
        _show_plan(summary)
    else:
        written.show(summary, config)


def _show_plan(summary: dict[str, Any]) -> None:
    rows = [
        (", ".join(group["layers"]), str(group["before"]), str(group["after"]), group["note"])
        for group in summary["groups"]
    ]
    console.print_table(("layers", "before", "after", "note"), rows)
    asked = "" if summary["asked"] in (0, summary["cut"]) else f" (requested: {summary['asked']:,})"
    console.print_line(f"channels  {summary['cut']:,} of {summary['total']:,} cut{asked}")
    before, after = summary["before"], summary["after"]
    for label, key in (("params", "params"), ("MACs", "macs"), ("bytes", "size_bytes")):
        if before.get(key) and after.get(key):
            change = _change(before[key], after[key])
            console.print_line(f"{label:<10}{before[key]:,} -> {after[key]:,}  ({change})")
    if "latency_ms" in after:
        was, now = before["latency_ms"], after["latency_ms"]
        console.print_line(f"latency   {was:.2f} -> {now:.2f} ms  (one image, ONNX Runtime; {_change(was, now)})")
    if "test_accuracy" in after:
        console.print_line(f"accuracy  {before['test_accuracy']:.2%} -> {after['test_accuracy']:.2%}  before training")
    if "output" in summary:
        console.print_line(f"wrote {summary['output']}  next: micronet finetune {summary['output']}")


def _show_sensitivity(rows: list[dict[str, Any]]) -> None:
    shares = sorted({share for row in rows for share in row["drops"]})
    table = [
        (
            ", ".join(row["layers"]),
            str(row["channels"]),
            *(f"{100 * row['drops'][share]:+.2f} pt" if share in row["drops"] else "-" for share in shares),
        )
        for row in rows
    ]
    console.print_table(("layers", "channels", *(f"{share:.0%} cut" for share in shares)), table)


def _change(before: float, after: float) -> str:
    return f"{abs(1 - after / before):.1%} {'more' if after > before else 'less'}"
