"""The ``check-onnx`` stage: what makes an ONNX file slow or wrong, before anyone deploys it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from micronet.core.config import group, setting
from micronet.errors import FailedError, MicronetError
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage


@dataclass(frozen=True)
class CheckOnnx(Stage):
    """Checks an ONNX file."""

    name = "check-onnx"
    details = (
        "Errors mean wrong results, or a file that does not load or build. Warnings mean a slow or large file. "
        "Whether a note matters depends on the machine."
    )
    example = "micronet check-onnx int8.onnx --target ort"
    suffix = None
    product = "list[Finding]"

    file: Path = input_file("An .onnx file, from micronet or any other tool.", kinds=(".onnx",), metavar="FILE")
    target: Literal["ort", "tensorrt", "both"] = setting("ort", "Target runtime.", basic=True)
    strict: bool = setting(False, "Exit with code 1 if there are errors or warnings.", basic=True)
    report: ReportConfig = group(ReportConfig)

    def run(self, context: Context) -> Outcome:
        """Apply every rule for the target, and count what ONNX Runtime runs in integers."""
        from micronet.onnx.integer_words import describe
        from micronet.onnx.integers import count_computed
        from micronet.onnx.lint import counted, lint
        from micronet.onnx.reader import read_onnx

        proto = read_onnx(self.file)
        findings = lint(proto, self.target)
        errors, warnings = (sum(each.severity == kind for each in findings) for kind in ("error", "warning"))
        try:
            found = count_computed(proto, self.file)
            integers = {**found, "words": describe(found)[: None if found["quantized"] else 1]}
        except MicronetError as error:
            integers = {"words": [str(error)]}
        summary = {
            "findings": [finding._asdict() for finding in findings],
            "integers": integers,
            "errors": errors,
            "warnings": warnings,
            "words": counted(findings),
        }
        return Outcome(findings, summary)

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError if the check is strict and found an error or a warning."""
        rules = dict.fromkeys(finding.rule for finding in outcome.product if finding.severity != "note")
        if self.strict and rules:
            raise FailedError(f"{self.file}: {outcome.summary['words']} ({', '.join(rules)})")
