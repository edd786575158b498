"""The ``inspect`` report: what a network file is; of an artifact by its header alone. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group
from micronet.core.files import FOLDER
from micronet.stages.config import ReportConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class Inspect(Stage):
    """Shows what a network file is."""

    name = "inspect"
    example = "micronet inspect int8.safetensors"
    suffix = None
    product = "dict[str, object]"
    takes_networks = False  # it reads a file's header

    artifact: Path = input_file(
        "An artifact, an .onnx file from anywhere, a .packed file, or a folder from export.",
        kinds=(".safetensors", ".onnx", ".packed", FOLDER),
        metavar="FILE",
    )
    report: ReportConfig = group(ReportConfig)

    def open(self, source: "Artifact | None") -> None:
        """Open nothing: the header is enough."""

    def run(self, context: Context) -> Outcome:
        """Read the file."""
        about = inspect_file(self.artifact)
        return Outcome(about, about)


def inspect_file(path: Path) -> dict[str, Any]:
    """Return what a network file or a folder from export says of itself; MicronetError or FailedError if damaged."""
    if path.is_dir():
        from micronet.stages.inspect_packed import inspect_folder as inspect
    elif path.suffix == ".onnx":
        from micronet.stages.inspect_onnx import inspect_onnx as inspect
    elif path.suffix == ".packed":
        from micronet.stages.inspect_packed import inspect_packed as inspect
    else:
        inspect = inspect_artifact
    return inspect(path)


def inspect_artifact(path: Path) -> dict[str, Any]:
    """Return what an artifact's header says, in JSON values; raise MicronetError if it is damaged."""
    from micronet.artifact.header import read_header
    from micronet.artifact.layers import layer_table

    header, table = read_header(path)
    value: dict[str, Any] = header.to_json()
    value["model"].pop("source", None)
    layers = [layer._asdict() for layer in layer_table(header, table.tensors)]
    about = {"file": str(path), "kind": "artifact", **value}
    return {**about, "size_bytes": path.stat().st_size, "layers": layers}
