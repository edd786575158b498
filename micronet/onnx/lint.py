"""Find what makes an ONNX file slow or wrong in ONNX Runtime or TensorRT, from the file alone.

The rules (``micronet.onnx.rules``) were verified with onnxruntime 1.32 on x86 and TensorRT-RTX 1.7; other versions may
behave differently. Subgraphs of If and Loop are not checked.
"""

import re
from collections import Counter
from typing import Literal, NamedTuple, get_args

import onnx

from micronet.errors import count
from micronet.onnx.graph_view import title
from micronet.onnx.rules.layers import LAYER_RULES
from micronet.onnx.rules.quantizers import QUANTIZER_RULES
from micronet.onnx.rules.rule import NOTHING, PTQ, LintedFile, Severity
from micronet.onnx.rules.storage import STORAGE_RULES

Target = Literal["ort", "tensorrt", "both"]
RULES = (*QUANTIZER_RULES, *LAYER_RULES, *STORAGE_RULES)


class Finding(NamedTuple):
    """A problem. An error: wrong results, or a file that does not load or build; a warning: slow or large."""

    rule: str
    severity: Severity
    node: str
    message: str
    cure: str


def lint(proto: onnx.ModelProto, target: Target) -> list[Finding]:
    """Apply the rules for a target to a model and return the findings, the worst first.

    A cure is what can be done about this very file: the options of other commands only help if micronet exported it. If
    nothing can be done, the finding is a note.
    """
    file = LintedFile.of(proto)
    found: list[Finding] = []
    for rule in RULES:
        levels = [level for name, level in rule.severity.items() if target in (name, "both")]
        if not levels:
            continue
        severity = next(level for level in get_args(Severity) if level in levels)
        cure = rule.cure if file.exported else rule.foreign
        for match in rule.check(file):
            fix = _new(match.cure or cure) if file.by_ptq else match.cure or cure
            level: Severity = "note" if fix.startswith("none") else severity
            found.append(Finding(rule.name, level, title(match.node), match.message, fix))
    return sorted(found, key=lambda finding: get_args(Severity).index(finding.severity))


def _new(cure: str) -> str:
    """Return what a cure offers beside the command that made the file, which changes something with options alone."""
    offers = [each for each in cure.split(", or ") if not re.match(rf"{re.escape(PTQ)}(,|$)", each)]
    return ", or ".join(offers) or NOTHING


def counted(findings: list[Finding]) -> str:
    """Return how many errors and warnings there are, as the table shows them: one for all nodes with the same finding.

    For example: 0 errors, 2 warnings at 6 nodes.
    """
    found = [each for each in findings if each.severity != "note"]
    shown = Counter(severity for _, severity, *_ in {each._replace(node="") for each in found})
    nodes = f" at {count(len(found), 'node')}" if len(found) > shown.total() else ""
    return f"{count(shown['error'], 'error')}, {count(shown['warning'], 'warning')}{nodes}"
