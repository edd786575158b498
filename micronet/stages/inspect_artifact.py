"""The ``inspect`` report: what an artifact is, read from its header alone, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class Inspect(Stage):
    """Shows what an artifact is."""

    name = "inspect"
    example = "micronet inspect int8.safetensors"
    suffix = None
    product = "dict[str, object]"
    takes_networks = False  # it reads a file's header

    artifact: Path = input_file()
    report: ReportConfig = group(ReportConfig)

    def open(self, source: "Artifact | None") -> None:
        """Open nothing: the header is enough."""

    def run(self, context: Context) -> Outcome:
        """Read the header."""
        from micronet.artifact.header import read_header
        from micronet.artifact.layers import layer_table

        header, table = read_header(self.artifact)
        value: dict[str, Any] = header.to_json()
        value["model"].pop("source", None)
        layers = [layer._asdict() for layer in layer_table(header, table.tensors)]
        about = {"file": str(self.artifact), **value, "size_bytes": self.artifact.stat().st_size, "layers": layers}
        return Outcome(about, about)
