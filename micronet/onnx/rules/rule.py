"""What a rule of the linter is: a check of a file, how bad a match is for each target, and what cures it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import onnx
from onnx_ir import Node

from micronet.onnx.graph_view import GraphView
from micronet.onnx.metadata import left_float, metadata

Severity = Literal["error", "warning", "note"]
# Cures. Every option they name exists (tests/onnx/test_lint.py).
FOR_ORT = "micronet export-onnx --target ort, which uses uint8 activations"
FOR_TENSORRT = "micronet quantize --q-type sym --a-sign signed, then micronet export-onnx --target tensorrt"
PTQ = "micronet quantize FLOAT.onnx --mode ptq"
NOTHING = "none: micronet quantize made this file"
PTQ_FOR_ORT = f"{PTQ} --a-sign auto"
PTQ_FOR_TENSORRT = f"{PTQ} --q-type sym --a-sign signed"


@dataclass(frozen=True)
class LintedFile:
    """An ONNX file to check.

    Attributes:
        graph: Its main graph.
        exported: It was made of an artifact, so that the options of the commands before export-onnx apply to it.
        by_ptq: ``quantize FILE.onnx`` made it, so that the same command again would change nothing.
        left_float: Layers that micronet left in float, if it quantized the file: name -> reason.
    """

    graph: GraphView
    exported: bool = False
    by_ptq: bool = False
    left_float: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: onnx.ModelProto) -> "LintedFile":
        """Return what the rules ask about a model."""
        about, reasons, graph = metadata(proto), left_float(proto), GraphView(proto)
        from_artifact = any(record.get("stage") == "quantize" for record in about.get("history", []))
        by_ptq = bool(graph.qdq) and reasons is not None and not from_artifact
        return cls(graph, "model" in about and not by_ptq, by_ptq, reasons or {})


class Match(NamedTuple):
    """A node, what is wrong with it, and what cures it if that is not the rule's cure."""

    node: Node
    message: str
    cure: str | None = None


Matches = Iterator[Match]
Check = Callable[[LintedFile], Matches]


class Rule(NamedTuple):
    """A check with its cures. ``severity``: target -> how bad a match is there.

    ``cure`` is for files that micronet exported, ``foreign`` for all others: they can only be quantized anew, which
    changes nothing about a file that the same command made (``NOTHING``).
    """

    name: str
    cure: str
    foreign: str
    severity: dict[str, Severity]
    check: Check


def rule(cure: str, foreign: str = PTQ, **severity: Severity) -> Callable[[Check], Rule]:
    """Make a function a rule under its name; ``severity``: ort=, tensorrt= or both."""
    return lambda check: Rule(check.__name__.replace("_", "-"), cure, foreign, severity, check)
