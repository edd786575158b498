"""``micronet pack``: the smallest file that runs, without torch."""

from typing import Annotated

import typer

from micronet.cli.options import DataOptions, Input, OutputOptions, default_name, with_configs
from micronet.runtime.options import CodeOptions

NAME = "pack"
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
    file runs with numpy alone (evaluate, compare and predict take it). What it cannot hold is named and nothing is
    written; nor is a file that puts test images into other classes than torch does.
    """
    import numpy as np
    from onnx import TensorProto

    from micronet.cli import console, stages
    from micronet.data.batches import plain_batches
    from micronet.data.dataset import DataSpec
    from micronet.data.split import draw
    from micronet.errors import FailedError
    from micronet.evaluation import agreement, evaluate, evaluating
    from micronet.export.check import LARGEST_FLOAT_ERROR, LEAST_AGREEMENT
    from micronet.export.onnx import to_onnx
    from micronet.export.pack import pack_model
    from micronet.files import check_target, write_bytes
    from micronet.runtime.packed.program import to_bytes
    from micronet.runtime.packed.run import run as run_packed

    path = output.output or default_name(artifact, ".packed")
    check_target(path, output.force, ".packed")
    opened = stages.open_artifact(artifact, code)
    dataset = stages.open_to_test(data, DataSpec.from_json(opened.data))
    images = draw(dataset.test, check_images, dataset.spec.seed)
    first, _ = next(plain_batches(images, dataset.spec))
    program = pack_model(to_onnx(opened, first))
    with evaluating(opened.model) as predict:
        ours = evaluate(predict, plain_batches(images, dataset.spec))
    theirs = evaluate(lambda batch: run_packed(program, batch), plain_batches(images, dataset.spec, 32))
    same = agreement(ours, theirs)
    wanted = opened.model.eval()(first).detach().numpy()
    error = float(np.linalg.norm(run_packed(program, first.numpy()) - wanted) / np.linalg.norm(wanted))
    if not any(operation.kind in ("quantize", "sign", "threshold") for operation in program.operations) and (
        error > LARGEST_FLOAT_ERROR[TensorProto.FLOAT]
    ):
        raise FailedError(f"the packed network's scores are {error:.2%} off torch's; nothing was written")
    if same < LEAST_AGREEMENT:
        raise FailedError(
            f"the packed network puts only {same:.2%} of {ours.images} images into torch's class; nothing was written"
        )
    write_bytes(path, to_bytes(program))
    size = path.stat().st_size
    if output.json:
        console.print_json({"output": str(path), "size_bytes": size, "classes": same, "images": ours.images})
    elif not output.quiet:
        console.print_line(f"wrote {path}  {size:,} bytes  agrees with torch on {same:.2%} of {ours.images} images")
