"""What commands print of their results: a function for each, over the summary that ``--json`` prints."""

import math
from collections.abc import Callable
from typing import Any

from micronet import registry
from micronet.cli.compress_view import show_search
from micronet.cli.console import print_json, print_line, print_table
from micronet.cli.entries import show_doctor, show_sections
from micronet.cli.file_views import show_inspection, show_verification
from micronet.cli.measures import (
    accuracy_figures,
    print_figures,
    print_left_float,
    pruned_latency,
    show_comparison,
    show_comparison_as_markdown,
    show_evaluation,
)
from micronet.core.metrics import drop_text, metric_label, value_text
from micronet.errors import count, listed
from micronet.stages.stage import Stage

BAR = 40  # characters
LISTED_NORMS = 3
LISTED_NODES = 3  # of one rule in check-onnx's table; --json lists them all


def show(stage: Stage, summary: Any) -> None:
    """Print a stage's result."""
    if getattr(stage, "markdown", False):
        show_comparison_as_markdown(summary)
    else:
        view: Callable[[Any], None] = _VIEWS.get(stage.name, _written)
        view(summary)


def _wrote(summary: dict[str, Any]) -> str:
    """Return the text that names a written file and its size."""
    return f"wrote {summary['output']}  {summary['size_bytes']:,} bytes"


def _written(summary: dict[str, Any]) -> None:
    """Print the file, its size and the test accuracy if it was measured."""
    print_line(f"{_wrote(summary)}{_tested(summary)}")
    _next(summary)


def _next(summary: dict[str, Any]) -> None:
    """Print the command that usually comes next."""
    if "next" in summary:
        print_line(f"next: {summary['next']}")


def _tested(summary: dict[str, Any]) -> str:
    """Return the text of the metrics on the test data, or nothing if they were not measured."""
    tested, accuracy = count(summary.get("test_images", 0), summary.get("noun", "sample")), summary.get("test_accuracy")
    if accuracy is not None:
        return f"  test accuracy {accuracy:.2%} on {tested}"
    metrics = {key.removeprefix("test_"): value for key, value in summary.items() if key.startswith("test_")}
    shown = [key for key in metrics if key not in ("images", "loss") and "/" not in key]
    found = [f"{metric_label(key)} {value_text(key, metrics[key])}" for key in shown]
    same = f", {summary['tested_on']}" if summary.get("tested_on") else ""
    return f"  test {', '.join(found)} on {tested}{same}" if found else ""


def _import(summary: dict[str, Any]) -> None:
    macs = f", {summary['macs']:,} MACs for an input of {summary['input']}" if summary["macs"] is not None else ""
    print_line(f"{summary['network']}{macs}")
    if summary["data"] is None:
        print_line(_wrote(summary))
        print_line("no data set is recorded yet; pass --data to the next command")
    else:
        _written(summary)


def _prune(summary: Any) -> None:
    """Print the plan with sizes before and after, the sensitivity of the groups, or the trained result."""
    if isinstance(summary, list):
        _prune_sensitivity(summary)
    elif "groups" in summary:
        _prune_plan(summary)
    else:
        _prune_sizes(summary)
        _written(summary)


def _prune_plan(summary: dict[str, Any]) -> None:
    latency = pruned_latency(summary.get("latency", {}))
    slower = bool(latency) and "slower" in latency[0]
    for line in latency if slower else []:
        print_line(line)
    rows = [
        (", ".join(group["layers"]), str(group["before"]), str(group["after"]), group["note"])
        for group in summary["groups"]
    ]
    print_table(("layers", "before", "after", "note"), rows)
    asked = "" if summary["asked"] in (0, summary["cut"]) else f" (requested: {summary['asked']:,})"
    print_line(f"channels  {summary['cut']:,} of {summary['total']:,} removed{asked}")
    _prune_sizes(summary)
    before, after = summary["before"], summary["after"]
    if "test_accuracy" in after:
        print_line(f"accuracy  {before['test_accuracy']:.2%} -> {after['test_accuracy']:.2%}  before finetuning")
    for key in [key for key in after if key.startswith("test_") and key != "test_accuracy"]:
        name, was, now = key.removeprefix("test_"), before[key], after[key]
        print_line(f"{metric_label(name):<10}{value_text(name, was)} -> {value_text(name, now)}  before finetuning")
    for line in [] if slower else latency:
        print_line(line)
    if summary["not_pruned"]:
        print_line(f"not pruned: {', '.join(summary['not_pruned'])}")
    if "output" in summary:
        print_line(f"wrote {summary['output']}")
    _next(summary)


def _prune_sizes(summary: dict[str, Any]) -> None:
    before, after = summary["before"], summary["after"]
    for label, key in (("params", "params"), ("MACs", "macs"), ("bytes", "size_bytes")):
        if before.get(key) and after.get(key):
            change = _change(before[key], after[key])
            print_line(f"{label:<10}{before[key]:,} -> {after[key]:,}  ({change})")


def _prune_sensitivity(rows: list[dict[str, Any]]) -> None:
    shares = sorted({share for row in rows for share in row["drops"]})
    table = []
    for row in rows:
        drops = [drop_text(row["metric"], row["drops"][share]) if share in row["drops"] else "-" for share in shares]
        table.append((", ".join(row["layers"]), str(row["channels"]), *drops))
    print_table(("layers", "channels", *(f"{share:.0%} removed" for share in shares)), table)


def _change(before: float, after: float) -> str:
    return f"{abs(1 - after / before):.1%} {'more' if after > before else 'less'}"


def _quantize(summary: Any) -> None:
    """Print the file with its accuracy and the layers left float, or the plan."""
    if isinstance(summary, list):
        print_table(("layer", "weight", "input", "note"), [tuple(row.values()) for row in summary])
    else:
        floats = {key.removeprefix("float_test_"): summary[key] for key in summary if key.startswith("float_test_")}
        before = [f"{value:.2%}" if name == "accuracy" else value_text(name, value) for name, value in floats.items()]
        _integers(summary, f"{_wrote(summary)}{_tested(summary)}{f' (float model: {before[0]})' if before else ''}")
        _next(summary)


def _bn_fuse(summary: dict[str, Any]) -> None:
    folded, left = summary["folded"], summary["left"]
    biases = "; rounded the biases to int32" if summary["rounded"] else ", and no biases to round"
    nothing = f"no batch norms {'can be folded' if left else 'left to fold'}{biases}"
    print_line(f"folded {count(folded, 'batch norm')}" if folded else nothing)
    for name, why in list(left.items())[:LISTED_NORMS]:
        print_line(f"not folded: {name} ({why})")
    if len(left) > LISTED_NORMS:
        print_line(f"not folded: {len(left) - LISTED_NORMS} more (--json lists all)")
    _written(summary)


def _agrees(summary: dict[str, Any]) -> str:
    if math.isnan(summary["classes"]):
        samples = count(summary["images"], "sample")
        return f"{_wrote(summary)}  differs from torch by {summary['error']:.4%} on {samples}"
    agrees = f"{_wrote(summary)}  agrees with torch on {summary['classes']:.2%} of {count(summary['images'], 'image')}"
    unstable = summary.get("unstable", 0)  # of which torch itself changes the class if roundings go the other way
    return f"{agrees} (torch with itself, values moved by 1/256 of a step: {unstable} changed)" if unstable else agrees


def _export_onnx(summary: dict[str, Any]) -> None:
    scores = "" if math.isnan(summary["classes"]) else f", relative score error {summary['error']:.4%}"
    _integers(summary, f"{_agrees(summary)}{scores}")
    if sizes := summary.get("low_bits"):
        print_line(f"weights in fewer than 8 bits: {sizes['bytes']:,} bytes instead of {sizes['int8_bytes']:,}")
    if summary["kept_float32"]:
        print_line("kept in float32: " + ", ".join(summary["kept_float32"]))


def _integers(summary: dict[str, Any], wrote: str) -> None:
    """Print what was written and what runs in integers; a file that is not faster than in float says so first."""
    found = summary.get("integers", {"words": [], "float": {}})
    slower = [line for line in found["words"][:1] if line.startswith(("slower", "no faster"))]
    for line in (*slower, wrote, *summary.get("warnings", []), *found["words"][len(slower) :]):
        print_line(line)
    print_left_float({name: why for name, why in summary["left_float"].items() if name not in found["float"]})


def _export(summary: dict[str, Any]) -> None:
    """Print what the stage of the target prints, or what was written and what its runtime executes."""
    view = _VIEWS.get(registry.TARGETS[summary["target"]])
    if view is not None:
        view(summary)
    else:
        _export_onnx({"kept_float32": {}, **summary})
        if found := summary.get("throughput"):
            print_line(f"{found['images_per_s']:,.0f} images/s in {count(found['streams'], 'stream')}")
        if sizes := summary.get("sizes"):
            print_line(f"flash {sizes['flash']:,} bytes without code, RAM {sizes['ram']:,} bytes")


def _pack(summary: dict[str, Any]) -> None:
    """Print what was written and how fast it is; that comes first if it is slow."""
    speed = summary.get("latency", {"words": ""})
    lines = [_agrees(summary), speed["words"]]
    for line in filter(None, lines[::-1] if speed.get("slower") else lines):
        print_line(line)
    print_left_float(summary["left_float"])


def _check_onnx(summary: dict[str, Any]) -> None:
    """Print the findings, one row for all nodes with the same one, then what runs in integers, and the counts."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for each in summary["findings"]:
        groups.setdefault((each["severity"], each["rule"], each["message"], each["cure"]), []).append(each["node"])
    rows = [
        (severity, rule, listed(nodes, LISTED_NODES), message, cure)
        for (severity, rule, message, cure), nodes in groups.items()
    ]
    if rows:
        print_table(("severity", "rule", "nodes", "problem", "fix"), rows)
    for line in (*summary["integers"]["words"], summary["words"]):
        print_line(line)


def _trt_build(summary: dict[str, Any]) -> None:
    counts = ", ".join(f"{number} in {kind}" for kind, number in summary["multiplies_in"].items())
    print_line(
        f"{_wrote(summary)}  {summary['backend']} {summary['version']}, {summary['precision']}; matrix and "
        f"convolution layers: {counts or 'not listed in the build log'}"
    )


def _trt_eval(summary: dict[str, Any]) -> None:
    """Print the figures, then latency and throughput by batch size."""
    lines = {
        "engine": f"{summary['backend']} {summary['version']}, {summary['precision']}",
        "GPU": summary["machine"]["gpu"],
        "file": f"{summary['size_bytes']:,} bytes",
    }
    if "accuracy" in summary:
        lines |= accuracy_figures(summary)
    elif "metrics" in summary:
        lines |= {metric_label(name): value_text(name, value) for name, value in summary["metrics"].items()}
    else:
        lines["pixel accuracy"] = f"{summary['pixel_accuracy']:.2%} of {count(summary['images'], 'image')}"
        lines["mean IoU"] = f"{summary['mean_iou']:.2%}"
    if summary["agreement"] is not None:
        lines["agreement with ONNX"] = f"{summary['agreement']:.2%}"
    print_figures(lines)
    rows = []
    for timing in summary["timings"]:
        times = [f"{timing[key]:.2f} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "device_ms")]
        rows.append(("x".join(map(str, timing["shape"])), *times, f"{timing['images_per_second']:,.0f}"))
    print_table(("input", "p50", "p95", "p99", "GPU only", "images/s"), rows)


def _plot(summary: dict[str, Any]) -> None:
    print_line(f"wrote {summary['output']}")


def _predict(summary: list[dict[str, Any]]) -> None:
    for row in summary:
        classes = "  ".join(f"{ranked['name']} {ranked['score']:.1%}" for ranked in row["classes"])
        print_line(f"{row['image']}  {classes}")


def _sensitivity(summary: list[dict[str, Any]]) -> None:
    """Print one row per layer, with a bar as long as its signal-to-noise ratio."""
    largest = max((row["sqnr_db"] for row in summary if math.isfinite(row["sqnr_db"])), default=1.0)
    rows = []
    for row in summary:
        bar = "█" * max(0, round(BAR * min(1, row["sqnr_db"] / largest)))
        rows.append((row["layer"], f"{row['sqnr_db']:.1f} dB", bar, drop_text(row["metric"], row["drop"])))
    metric = summary[0]["metric"] if summary else "accuracy"
    print_table(("layer", "SQNR", "", "drop" if metric == "accuracy" else f"drop ({metric_label(metric)})"), rows)


_VIEWS: dict[str, Callable[[Any], None]] = {
    "compress": show_search,
    "import": _import, "prune": _prune, "quantize": _quantize, "bn-fuse": _bn_fuse, "export": _export,
    "export-onnx": _export_onnx,
    "check-onnx": _check_onnx, "pack": _pack,
    "trt-build": _trt_build, "trt-eval": _trt_eval, "evaluate": show_evaluation, "compare": show_comparison,
    "report": show_comparison, "plot": _plot, "predict": _predict, "inspect": show_inspection,
    "verify": show_verification,
    "sensitivity": _sensitivity, "schema": print_json, "doctor": show_doctor, "list": show_sections,
    "card": lambda summary: print_line(summary.get("card", "").rstrip("\n") or _wrote(summary)),
}  # fmt: skip
