"""The result of ``inspect``."""

from typing import Any

from micronet.cli import console


def show(summary: dict[str, Any], config: Any) -> None:
    """Print what the header says, then one row per layer."""
    model, data = summary["model"], summary["data"]
    console.print_line(f"{summary['file']}  {summary['size_bytes']:,} bytes")
    console.print_line(f"model     {model['name']}({_pairs(model.get('args', {}), '=')})")
    if data and data.get("name"):
        shape = f"{data['channels']}x{data['image_size']}x{data['image_size']}"
        about = f"{len(data['classes'])} classes, {shape}, mean {data['mean']}, std {data['std']}"
        console.print_line(f"data      {data['name']}, {about}")
    if summary["seed"] is not None:
        console.print_line(f"seed      {summary['seed']}")
    console.print_line("history")
    for number, record in enumerate(summary["history"], 1):
        console.print_line(f"  {number}. {record['stage']}  {_pairs(record['config'], '=')}")
    if summary["metrics"]:
        console.print_line(f"metrics   {_pairs(summary['metrics'], ' ')}")
    console.print_line(f"versions  {_pairs(summary['versions'], ' ')}")
    rows = [
        (layer["name"], layer["shape"], f"{layer['params']:,}", f"{layer['size_bytes']:,}", layer["quantization"])
        for layer in summary["layers"]
    ]
    console.print_table(("layer", "weight", "params", "bytes", "quantization"), rows)


def _pairs(values: dict[str, Any], join: str) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key}{join}{value}" for key, value in shown.items())
