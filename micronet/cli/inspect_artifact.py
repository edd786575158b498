"""``micronet inspect``: what an artifact is, read from its header alone."""

from typing import Any

from micronet.cli import console
from micronet.cli.options import Input, ReportOptions, with_configs

EXAMPLE = "micronet inspect int8.safetensors"


@with_configs
def run(artifact: Input, *, report: ReportOptions) -> None:
    """Show an artifact's network, history, data, metrics and layers, without loading it."""
    from micronet.artifact.header import read_header
    from micronet.artifact.layer_table import layer_table

    header, tensors = read_header(artifact)
    layers = layer_table(header, tensors)
    size = artifact.stat().st_size
    if report.json:
        value: dict[str, Any] = header.to_json()
        value["model"].pop("source", None)
        console.print_json({**value, "size_bytes": size, "layers": [layer._asdict() for layer in layers]})
        return
    args = ", ".join(f"{key}={value}" for key, value in header.model.get("args", {}).items())
    console.print_line(f"{artifact}  {size:,} bytes")
    console.print_line(f"model     {header.model['name']}({args})")
    if header.data and header.data.get("name"):
        data = header.data
        console.print_line(
            f"data      {data['name']}, {len(data['classes'])} classes, "
            f"{data['channels']}x{data['image_size']}x{data['image_size']}, mean {data['mean']}, std {data['std']}"
        )
    if header.seed is not None:
        console.print_line(f"seed      {header.seed}")
    console.print_line("history")
    for number, record in enumerate(header.history, 1):
        settings = ", ".join(f"{key}={value}" for key, value in record.config.items())
        console.print_line(f"  {number}. {record.stage}  {settings}")
    if header.metrics:
        console.print_line("metrics   " + ", ".join(f"{key} {_short(value)}" for key, value in header.metrics.items()))
    console.print_line("versions  " + ", ".join(f"{name} {version}" for name, version in header.versions.items()))
    if header.command:
        console.print_line(f"command   {header.command}")
    rows = [
        (layer.name, layer.shape, f"{layer.params:,}", f"{layer.size_bytes:,}", layer.quantization) for layer in layers
    ]
    console.print_table(("layer", "weight", "params", "bytes", "quantization"), rows)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
