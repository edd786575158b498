"""``micronet pack``: the smallest file that runs, without torch."""

from typing import Annotated

import typer

from micronet.cli.options import DataOptions, Input, OutputOptions, default_name, with_configs
from micronet.runtimes.config import CodeOptions

EXAMPLE = "micronet pack fused.safetensors -o small.packed"


@with_configs
def run(
    artifact: Input,
    check_images: Annotated[
        int, typer.Option(min=1, help="Test images on which the packed network must agree with torch.")
    ] = 256,
    *,
    data: DataOptions,
    code: CodeOptions,
    output: OutputOptions,
) -> None:
    """Write a network at its weights' true width: 1 bit binary, five ternary weights a byte, 2 to 8 bits dense.

    Batch norms are folded; with binary activations scales, biases and batch norms become one threshold a channel. The
    file runs without torch (evaluate, compare and predict take it). What it cannot hold is named and nothing is
    written; nor is a file that puts test images into other classes than torch does.
    """
    from onnx import TensorProto

    from micronet.cli import console, stages
    from micronet.core.files import check_output_path, write_bytes
    from micronet.errors import FailedError
    from micronet.onnx.check import LARGEST_FLOAT_ERROR, LEAST_AGREEMENT, compare_scores
    from micronet.onnx.export import to_onnx
    from micronet.packed.from_onnx import pack_model
    from micronet.packed.file_format import to_bytes
    from micronet.runtimes.packed.numpy_backend import run as run_packed

    path = output.output or default_name(artifact, ".packed")
    check_output_path(path, output.force, ".packed")
    opened, batches = stages.open_to_export(artifact, code, data, check_images)
    program = pack_model(to_onnx(opened, next(batches())))
    found = compare_scores(opened.model, lambda images: run_packed(program, images), batches())
    rounds = any(operation.kind in ("quantize", "sign", "threshold") for operation in program.operations)
    if not rounds and found.error > LARGEST_FLOAT_ERROR[TensorProto.FLOAT]:
        raise FailedError(f"the packed network's scores are {found.error:.2%} off torch's; nothing was written")
    if found.classes < LEAST_AGREEMENT:
        raise FailedError(
            f"the packed network puts only {found.classes:.2%} of {found.images} images into torch's class; "
            "nothing was written"
        )
    write_bytes(path, to_bytes(program))
    size = path.stat().st_size
    if output.json:
        console.print_json({"output": str(path), "size_bytes": size, **found._asdict()})
    elif not output.quiet:
        console.print_line(
            f"wrote {path}  {size:,} bytes  agrees with torch on {found.classes:.2%} of {found.images} images"
        )
