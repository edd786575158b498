"""The ``check-onnx`` report: why an ONNX file would be slow or wrong, before anyone deploys it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from micronet.core.config import group, setting
from micronet.errors import FailedError
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class CheckOnnxSettings:
    """The settings of ``check-onnx``."""

    file: Path = input_file("An .onnx file, from micronet or from elsewhere.", kinds=(".onnx",), metavar="FILE")
    target: Literal["ort", "tensorrt", "both"] = setting("ort", "The runtime it is for.", basic=True)
    strict: bool = setting(False, "Exit with 1 if there is an error or a warning.", basic=True)
    report: ReportConfig = group(ReportConfig)


class CheckOnnx(Stage):
    """Checks an ONNX file."""

    name = "check-onnx"
    details = (
        "An error means wrong results, or a file that does not load or build; a warning means a slow or large one; a "
        "note depends on the machine."
    )
    example = "micronet check-onnx int8.onnx --target ort"
    Config = CheckOnnxSettings
    suffix = None
    product = "list[Finding]"

    def run(self, artifact: "Artifact | None", config: CheckOnnxSettings, context: Context) -> Outcome:
        """Apply every rule for the target, and count what ONNX Runtime runs in integers."""
        from micronet.onnx.lint import count_integer_ops, lint
        from micronet.runtimes.onnxruntime import read_onnx

        proto = read_onnx(config.file)
        findings = lint(proto, config.target)
        errors, warnings = (sum(each.severity == kind for each in findings) for kind in ("error", "warning"))
        summary = {
            "findings": [finding._asdict() for finding in findings],
            "fused": count_integer_ops(proto, config.file),
            "errors": errors,
            "warnings": warnings,
        }
        return Outcome(findings, summary)

    def judge(self, config: CheckOnnxSettings, outcome: Outcome) -> None:
        """Raise FailedError if the check is strict and found an error or a warning."""
        rules = dict.fromkeys(finding.rule for finding in outcome.product if finding.severity != "note")
        if config.strict and rules:
            errors, warnings = outcome.summary["errors"], outcome.summary["warnings"]
            raise FailedError(
                f"{config.file}: {count(errors, 'error')}, {count(warnings, 'warning')} ({', '.join(rules)})"
            )


def count(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 error``, ``2 errors``."""
    return f"{number} {noun}{'s' * (number != 1)}"


CHECK_ONNX = CheckOnnx()
