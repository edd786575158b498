"""The ``pack`` stage: the smallest file that runs, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.errors import FailedError
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import DataConfig, OutputConfig, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

ROUNDING = ("quantize", "sign", "threshold")  # operations after which scores are no longer the float network's


@dataclass(frozen=True)
class PackSettings:
    """The settings of ``pack``."""

    artifact: Path = input_file()
    check_images: int = setting(
        256, "Test images on which the packed network must agree with torch.", low=1, metavar="N"
    )
    data: DataConfig = group(DataConfig)
    code: CodeOptions = group(CodeOptions)
    output: OutputConfig = group(OutputConfig)


class Pack(Stage):
    """Packs a network."""

    name = "pack"
    details = (
        "Batch norms are folded; with binary activations, scales, biases and batch norms become one threshold per "
        "channel. The file runs without torch (evaluate, compare and predict take it). Nothing is written if the "
        "format cannot hold the network, or if the packed network assigns test images to other classes than torch does."
    )
    example = "micronet pack fused.safetensors -o small.packed"
    Config = PackSettings
    ending = ".packed"
    suffix = ".packed"
    product = "Program"

    def run(self, artifact: "Artifact | None", config: PackSettings, context: Context) -> Outcome:
        """Pack the network and compare it with torch."""
        from onnx import TensorProto

        from micronet.onnx.check import LARGEST_FLOAT_ERROR, LEAST_AGREEMENT, compare_scores
        from micronet.onnx.export import to_onnx
        from micronet.packed.from_onnx import pack_model
        from micronet.runtimes.packed.numpy_backend import run as run_packed
        from micronet.stages.inputs import export_batches

        assert artifact is not None
        artifact, batches = export_batches(artifact, config.data, config.check_images)
        program = pack_model(to_onnx(artifact, next(batches())))
        found = compare_scores(artifact.model, lambda images: run_packed(program, images), batches())
        rounds = any(operation.kind in ROUNDING for operation in program.operations)
        if not rounds and found.error > LARGEST_FLOAT_ERROR[TensorProto.FLOAT]:
            raise FailedError(f"the packed scores differ from torch's by {found.error:.2%}; nothing was written")
        if found.classes < LEAST_AGREEMENT:
            raise FailedError(
                f"the packed network agrees with torch on only {found.classes:.2%} of {found.images} images; "
                "nothing was written"
            )
        return Outcome(program, found._asdict())

    def write(self, product: Any, path: Path) -> None:
        """Write the file."""
        from micronet.core.files import write_bytes
        from micronet.packed.file_format import to_bytes

        write_bytes(path, to_bytes(product))


PACK = Pack()
