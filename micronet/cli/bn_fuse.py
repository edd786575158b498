"""``micronet bn-fuse``: batch norms disappear into the layers before them."""

from micronet.cli.options import Input, OutputOptions, default_name, with_configs
from micronet.runtimes.config import CodeOptions

EXAMPLE = "micronet bn-fuse int8.safetensors -o fused.safetensors"


@with_configs
def run(artifact: Input, *, code: CodeOptions, output: OutputOptions) -> None:
    """Fold every batch norm into the layer before it; quantized weights keep their integers, biases become int32."""
    from micronet.artifact.artifact import save
    from micronet.cli import console, stages
    from micronet.core.files import check_output_path
    from micronet.quantization.fold import fold_model

    path = output.output or default_name(artifact, "-fused.safetensors")
    check_output_path(path, output.force)
    opened = stages.open_artifact(artifact, code, "bn-fuse")
    model, record = fold_model(opened.model, opened.history)
    if not output.json and not output.quiet:
        folded = len(record.result["pairs"]) + len(record.result["taken"])
        console.print_line(
            f"folded {folded} batch norms"
            if folded
            else "no batch norm to fold; biases rounded to the unit of the integers' sums"
        )
    fused = opened.after(record, model=model, metrics={})  # what was measured before is not its own
    save(fused, path)
    stages.report(fused, path, output)
