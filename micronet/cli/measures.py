"""What ``evaluate``, ``compare``, ``prune`` and ``trt-eval`` print of figures."""

from collections.abc import Sequence
from typing import Any

from micronet.cli.console import print_line, print_table
from micronet.core.metrics import metric_label, value_text
from micronet.core.timing import is_slower
from micronet.errors import by_reason, count, listed
from micronet.stages.words import OTHER_WIDTHS

FIGURES = ("name", "runtime", "accuracy", "drop", "agrees", "MACs", "params", "bytes", "smaller")
BATCHES = {"latency": 1, "latency_batch64": 64}  # the keys of the latencies begin with these
LISTED_LAYERS = 3


def show_evaluation(summary: dict[str, Any]) -> None:
    """Print the metrics, latencies and size of one network."""
    latencies = {
        f"latency, {count(size, summary['noun'])}": (
            f"{summary[f'{key}_ms']:.2f} ms, p95 {summary[f'{key}_p95_ms']:.2f} ms"
        )
        for key, size in BATCHES.items()
        if summary["latency_ms"] is not None
    }
    figures = {
        **(_metrics(summary) if summary["accuracy"] is None else accuracy_figures(summary)),
        **latencies,
        "file": f"{summary['size_bytes']:,} bytes",
        "parameters": f"{summary['params']:,}",
        "runtime": summary["runtime"],
    }
    print_figures(figures)


def _metrics(summary: dict[str, Any]) -> dict[str, str]:
    found = {metric_label(name): value_text(name, value) for name, value in summary["metrics"].items()}
    return {**found, f"{summary['noun']}s": f"{summary['images']:,}{_after_comma(summary['tested_on'])}"}


def _after_comma(text: str) -> str:
    return f", {text}" if text else ""


def accuracy_figures(summary: dict[str, Any]) -> dict[str, str]:
    """Return the accuracy and the loss of a classifier, as text by label."""
    accuracy = f"{summary['accuracy']:.2%} of {count(summary['images'], summary['noun'])}"
    return {"accuracy": accuracy, "loss": f"{summary['loss']:.4f}"}


def print_figures(figures: dict[str, str]) -> None:
    """Print one line for each figure."""
    for name, value in figures.items():
        print_line(f"{name:<20}{value}")


def print_left_float(reasons: dict[str, str]) -> None:
    """Print the layers that stay in float, one line for all with the same reason."""
    for why, names in by_reason(reasons).items():
        print_line(f"kept in float: {listed(names, LISTED_LAYERS)} ({why})")


def show_comparison(summary: dict[str, Any]) -> None:
    """Print one row for each network."""
    rows, words = summary["rows"], summary["words"]
    slower = [line for line in words if " is slower than " in line]
    for line in slower:
        print_line(line)
    title = count(rows[0]["images"], f"test {summary['noun']}") + _after_comma(summary["tested_on"])
    heads, table = _split_times(_heads(summary), [_figures(row) for row in rows])
    print_table(heads, table, title, _least_important(heads, rows))
    for line in words[len(slower) :]:
        print_line(line)
    if "html" in summary:
        print_line(f"wrote {summary['html']}")


def show_comparison_as_markdown(summary: dict[str, Any]) -> None:
    """Print the table of ``show_comparison`` in Markdown."""
    heads = _heads(summary)
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *map(_figures, summary["rows"])]
    print_line("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _split_times(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table with the p95 of each latency in a column of its own, so that a terminal can leave it out."""
    columns: dict[str, list[str]] = {}
    for head, *cells in zip(heads, *rows, strict=True):
        parts = [cell.removesuffix(")").partition(" (p95 ") for cell in cells]
        columns[head] = [first for first, _, _ in parts]
        if any(split for _, split, _ in parts):
            columns[f"p95 of {head.partition(' ')[0]}"] = [last for _, _, last in parts]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _least_important(heads: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of a comparison that a narrow terminal leaves out, the least important first."""
    times = [head for head in heads if head.startswith(f"{BATCHES['latency_batch64']} ")]
    same = len({row["runtime"] for row in rows}) == 1
    if len({row["name"] for row in rows}) < len(rows):  # only the runtime tells rows apart
        return ["p95 of 64", "params", "MACs", "smaller", *times, "p95 of 1", "agrees", "drop", "bytes"]
    order = ["p95 of 64", "params", *["runtime"] * same, "MACs", "smaller", *times, "p95 of 1", "agrees", "runtime"]
    return [*dict.fromkeys(order), "drop"]


def _heads(summary: dict[str, Any]) -> tuple[str, ...]:
    """Return the heads of the columns: of classification, or with the metrics of another task."""
    first = summary["rows"][0]
    timed = first["latency_ms"] is not None
    times = [count(size, summary["noun"]) for size in BATCHES.values()] if timed else []
    if first["accuracy"] is not None:
        return (*FIGURES, *times)
    metrics = [metric_label(name) for name in first["metrics"] if "/" not in name]
    return (*FIGURES[:2], *metrics, *FIGURES[5:], *times)


def _figures(row: dict[str, Any]) -> list[str]:
    quality = [value_text(name, value) for name, value in row["metrics"].items() if "/" not in name]
    if row["accuracy"] is not None:
        quality = [f"{row['accuracy']:.2%}", f"{100 * row['drop']:+.2f} pt", f"{row['agreement']:.2%}"]
    times = (
        [
            f"{row['latency_ms']:.2f} ms (p95 {row['latency_p95_ms']:.2f})",
            f"{row['latency_batch64_ms']:.1f} ms (p95 {row['latency_batch64_p95_ms']:.1f})",
        ]
        if row["latency_ms"] is not None
        else []
    )
    return [
        row["name"],
        row["runtime"],
        *quality,
        "?" if row["macs"] is None else f"{row['macs'] / 1e6:.1f} M",
        f"{row['params']:,}",
        f"{row['size_bytes']:,}",
        f"{row['compression']:.1%}",
        *times,
    ]


def pruned_latency(latency: dict[str, Any]) -> list[str]:
    """Return what was measured of a pruned network in words; the first line says "slower" if it is."""
    if "skipped" in latency:
        return [f"latency   not measured ({latency['skipped']})"]
    if not latency:
        return []
    was, now, regular = latency["before_ms"], latency["after_ms"], latency.get("regular_8_ms")
    measured = f"{now:.2f} ms vs. {was:.2f} ms before (ONNX Runtime, 1 thread, batch 1)"
    lines = [f"the pruned network is slower: {measured}" if is_slower(now, was) else f"latency   {measured}"]
    if regular is not None and is_slower(now, regular):
        lines.append(f"--regular 8 is faster at the same pruning ratio: {regular:.2f} ms vs. {now:.2f} ms; add it")
    elif is_slower(now, was):
        lines.append(OTHER_WIDTHS)
    return lines
