"""The ``export-onnx`` stage: an ONNX file whose weights are integers, checked against torch before it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.errors import MicronetError
from micronet.onnx.config import ExportConfig
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import DataConfig, OutputConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact


@dataclass(frozen=True)
class ExportOnnxSettings:
    """The settings of ``export-onnx``."""

    artifact: Path = input_file()
    check_images: int = setting(256, "Test images on which ONNX Runtime must agree with torch.", low=1, metavar="N")
    export: ExportConfig = group(ExportConfig)
    data: DataConfig = group(DataConfig)
    code: CodeOptions = group(CodeOptions)
    output: OutputConfig = group(OutputConfig)


class ExportOnnx(Stage):
    """Exports a network to ONNX."""

    name = "export-onnx"
    details = (
        "Nothing is written if ONNX Runtime does not compute what torch computes: if it assigns more than 1 % of the "
        "images to other classes, if a layer differs by more than one step for the same input, or if a float network's "
        "scores differ by more than 0.1 % (fp16: 2 %). A warning reports scores that differ by more than 1 % although "
        "every layer agrees. See what slows the file down with micronet check-onnx."
    )
    example = "micronet export-onnx fused.safetensors -o int8.onnx"
    Config = ExportOnnxSettings
    ending = ".onnx"
    suffix = ".onnx"
    product = "ModelProto"
    takes_batches = True
    takes_example = True

    def run(self, artifact: "Artifact | None", config: ExportOnnxSettings, context: Context) -> Outcome:
        """Export the network and compare the file with it."""
        from micronet.onnx.check import compare_outputs, drift, require_agreement
        from micronet.onnx.export import to_onnx
        from micronet.runtimes.onnxruntime import metadata
        from micronet.stages.inputs import export_batches

        assert artifact is not None
        memory = context.memory
        if isinstance(memory.example, tuple):
            raise MicronetError("export-onnx takes networks with one input; this example is a tuple")
        given = memory.batches if memory.example is None else [memory.example]
        if given is None:
            artifact, batches = export_batches(artifact, config.data, config.check_images)
            given = list(batches())
        first = given[0]
        proto = to_onnx(artifact, first, config.export)
        agreement = compare_outputs(artifact.model, proto, given)
        require_agreement(artifact.model, proto, first, agreement)
        warning = drift(agreement, artifact.history)
        if warning:
            context.progress.line(f"warning: {warning}")
        about = {"kept_float32": metadata(proto).get("kept_float32", {}), **agreement._asdict(), "warning": warning}
        return Outcome(proto, about)

    def write(self, product: Any, path: Path) -> None:
        """Write the file."""
        from micronet.onnx.export import write_onnx

        write_onnx(product, path)


EXPORT_ONNX = ExportOnnx()
