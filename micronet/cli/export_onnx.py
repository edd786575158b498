"""``micronet export-onnx``: an ONNX file whose weights are integers, checked against torch before it is written."""

from typing import Annotated

import typer

from micronet.cli.options import DataOptions, Input, OutputOptions, default_name, with_configs
from micronet.onnx.config import ExportConfig
from micronet.runtimes.config import CodeOptions

EXAMPLE = "micronet export-onnx fused.safetensors -o int8.onnx"


@with_configs
def run(
    artifact: Input,
    check_images: Annotated[
        int, typer.Option(min=1, help="Test images on which ONNX Runtime must agree with torch.")
    ] = 256,
    *,
    export: ExportConfig = ExportConfig(),  # noqa: B008
    data: DataOptions,
    code: CodeOptions,
    output: OutputOptions,
) -> None:
    """Export to ONNX with quantized weights as int8, in the form ONNX Runtime or TensorRT is fast with.

    Nothing is written where ONNX Runtime does not compute what torch computes: where it puts more than 1 % of the
    images into other classes, a layer is more than a step off on the same input, or a float network's scores are more
    than 0.1 % off (half: 2 %). A warning tells of scores that are more than 1 % off although every layer agrees.
    What is in the way of speed: micronet check-onnx.
    """
    from micronet.cli import console, stages
    from micronet.core.files import check_output_path
    from micronet.onnx.check import compare_outputs, drift, require_agreement
    from micronet.onnx.export import to_onnx, write_onnx
    from micronet.onnx.rewrite import kept_line
    from micronet.runtimes.onnxruntime import metadata

    path = output.output or default_name(artifact, ".onnx")
    check_output_path(path, output.force, ".onnx")
    opened, batches = stages.open_to_export(artifact, code, data, check_images)
    first = next(batches())
    proto = to_onnx(opened, first, export)
    kept = metadata(proto).get("kept_float32", {})
    agreement = compare_outputs(opened.model, proto, batches())
    require_agreement(opened.model, proto, first, agreement)
    write_onnx(proto, path)
    size = path.stat().st_size
    if (warning := drift(agreement, opened.history)) and not output.quiet:
        console.print_error(warning, "warning")
    if output.json:
        measured = {**agreement._asdict(), "warning": warning}
        console.print_json({"output": str(path), "size_bytes": size, "kept_float32": kept, **measured})
    elif not output.quiet:
        console.print_line(
            f"wrote {path}  {size:,} bytes  agrees with torch on {agreement.classes:.2%} of {agreement.images} images, "
            f"relative score error {agreement.error:.4%}"
        )
        if kept:
            console.print_line(kept_line(kept))
