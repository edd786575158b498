"""The result of ``check-onnx``."""

from typing import Any

from micronet.cli import console
from micronet.stages.check_onnx import count

LISTED = 3  # nodes of one rule in the table; --json lists them all


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the findings, what runs in integers, and the counts."""
    if summary["findings"]:
        console.print_table(("severity", "rule", "where", "what", "cure"), _rows(summary["findings"]))
    console.print_line(_integers(summary["fused"]))
    console.print_line(f"{count(summary['errors'], 'error')}, {count(summary['warnings'], 'warning')}")


def _rows(findings: list[dict[str, str]]) -> list[tuple[str, ...]]:
    """Return one row for all findings with the same text."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for each in findings:
        groups.setdefault((each["severity"], each["rule"], each["message"], each["cure"]), []).append(each["node"])
    rows: list[tuple[str, ...]] = []
    for (severity, rule, message, cure), nodes in groups.items():
        more = f" and {len(nodes) - LISTED} more" if len(nodes) > LISTED else ""
        rows.append((severity, rule, ", ".join(nodes[:LISTED]) + more, message, cure))
    return rows


def _integers(fused: dict[str, dict[str, int]] | None) -> str:
    """Describe what ONNX Runtime computes in integers."""
    if fused is None:
        return "ONNX Runtime cannot load this file"
    counts = [f"{each['integer']} of {each['all']} {noun}" for noun, each in fused.items() if each["all"]]
    return f"ONNX Runtime runs {', '.join(counts)} in integers" if counts else "no layer could run in integers"
