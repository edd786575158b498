"""``micronet check-onnx``: why an ONNX file would be slow or wrong, said before anyone deploys it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from micronet.cli import console
from micronet.cli.options import ReportOptions, of_kind, with_configs
from micronet.errors import FailedError

if TYPE_CHECKING:
    from micronet.onnx.lint import Finding

EXAMPLE = "micronet check-onnx int8.onnx --target ort"
LISTED = 3  # nodes of one rule in the table; --json lists them all


@with_configs
def run(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="An .onnx file, from micronet or from elsewhere.", callback=of_kind(".onnx")
        ),
    ],
    target: Annotated[Literal["ort", "tensorrt", "both"], typer.Option(help="Where it is to run.")] = "ort",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 where an error or a warning is found.")] = False,
    *,
    report: ReportOptions,
) -> None:
    """Say what makes an ONNX file slow or wrong in ONNX Runtime or TensorRT, and what to do about it.

    An error means wrong results, or a file that does not load or build; a warning, one that is slow or large; a note,
    what depends on the machine.
    """
    from micronet.onnx.lint import fused, lint
    from micronet.runtimes.onnxruntime import read_onnx

    proto = read_onnx(file)
    findings = lint(proto, target)
    integers = fused(proto, file)
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    counted = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    if report.json:
        found = [finding._asdict() for finding in findings]
        console.print_json({"findings": found, "fused": integers, "errors": errors, "warnings": warnings})
    else:
        if findings:
            console.print_table(("severity", "rule", "where", "what", "cure"), _rows(findings))
        console.print_line(_fusion(integers))
        console.print_line(counted)
    if strict and errors + warnings:
        rules = ", ".join(dict.fromkeys(finding.rule for finding in findings if finding.severity != "note"))
        raise FailedError(f"{file}: {counted} ({rules})")


def _rows(findings: "list[Finding]") -> list[tuple[str, ...]]:
    """Return one row for all findings that say the same."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        alike.setdefault((finding.severity, finding.rule, finding.message, finding.cure), []).append(finding.node)
    rows: list[tuple[str, ...]] = []
    for (severity, rule, message, cure), nodes in alike.items():
        more = f" and {len(nodes) - LISTED} more" if len(nodes) > LISTED else ""
        rows.append((severity, rule, ", ".join(nodes[:LISTED]) + more, message, cure))
    return rows


def _fusion(integers: dict[str, dict[str, int]] | None) -> str:
    """Put what ONNX Runtime computes in integers into a line."""
    if integers is None:
        return "ONNX Runtime refuses this file as it is"
    counts = [f"{count['integer']} of {count['all']} {noun}" for noun, count in integers.items() if count["all"]]
    return f"ONNX Runtime runs {', '.join(counts) or 'nothing that it could'} in integers"
