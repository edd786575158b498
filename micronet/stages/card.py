"""The ``card`` command: a model card in Markdown, from what a network file says of itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.core.config import group, setting
from micronet.core.files import FOLDER, check_output_path, write_bytes
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class Card(Stage):
    """Writes a model card."""

    name = "card"
    details = (
        "It says what the network is, how it was made, on which data, what was measured, and its limits. What only you "
        "know, such as the licence, is left to fill in."
    )
    example = "micronet card int8.safetensors -o card.md"
    suffix = None
    product = "str"
    takes_networks = False  # it reads a file

    file: Path = input_file(
        "An artifact, an .onnx or .packed file, or a folder from export.",
        kinds=(".safetensors", ".onnx", ".packed", FOLDER),
        metavar="FILE",
    )
    output: Path | None = setting(
        None, "Markdown file (.md) to write. Default: the card is printed.", "-o", basic=True, place="file"
    )
    force: bool = setting(False, "Overwrite an existing file.", basic=True)
    report: ReportConfig = group(ReportConfig)

    def open(self, source: "Artifact | None") -> None:
        """Open nothing: what the file says of itself is enough."""

    def run(self, context: Context) -> Outcome:
        """Write the card."""
        from micronet.stages.card_text import card_text
        from micronet.stages.inspect_artifact import inspect_file

        if self.output is not None:
            check_output_path(self.output, self.force, ".md")
        text = card_text(inspect_file(self.file))
        if self.output is None:
            return Outcome(text, {"card": text})
        write_bytes(self.output, text.encode())
        return Outcome(text, {"output": str(self.output), "size_bytes": len(text.encode())})
