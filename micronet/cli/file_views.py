"""What ``inspect`` and ``verify`` print: what files say of themselves, and whether it holds."""

from typing import Any

from micronet.cli.console import print_line, print_table
from micronet.errors import count


def show_inspection(summary: dict[str, Any]) -> None:
    """Print what the header says, then one row per layer."""
    model, data = summary["model"], summary["data"]
    print_line(f"{summary['file']}  {summary['size_bytes']:,} bytes")
    print_line(f"model     {model['name']}({_pairs(model.get('args', {}), '=')})")
    if data and data.get("task"):
        print_line(f"task      {data['task']}")
    if data and data.get("inputs"):
        shapes = " and ".join(f"{each['dtype']} {each['shape']}" for each in data["inputs"])
        print_line(f"data      {data['name']}, inputs {shapes}")
    elif data and data.get("name") and data.get("image_size"):
        shape = f"{data.get('channels')}x{data['image_size']}x{data['image_size']}"
        classes = count(len(data.get("classes") or []), "class")
        about = f"{classes}, {shape}, mean {data.get('mean')}, std {data.get('std')}"
        print_line(f"data      {data['name']}, {about}")
    if summary["seed"] is not None:
        print_line(f"seed      {summary['seed']}")
    print_line("history")
    for number, record in enumerate(summary["history"], 1):
        print_line(f"  {number}. {record['stage']}  {_pairs(record['config'], '=')}")
    if summary["metrics"]:
        print_line(f"metrics   {_pairs(summary['metrics'], ' ')}")
    print_line(f"versions  {_pairs(summary['versions'], ' ')}")
    rows = [
        (layer["name"], layer["shape"], f"{layer['params']:,}", f"{layer['size_bytes']:,}", layer["quantization"])
        for layer in summary["layers"]
    ]
    print_table(("layer", "weight", "params", "bytes", "quantization"), rows)


def show_verification(summary: list[dict[str, Any]]) -> None:
    """Print one row per file."""
    columns = ("checksums", "history", "quantizers", "agrees", "problem")
    for row in summary:
        print_line(row["file"])
        for name in columns:
            if row.get(name) not in (None, "", 0, False):
                print_line(f"  {name:<11} {'with its artifact' if row[name] is True else row[name]}")


def _pairs(values: dict[str, Any], join: str) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key}{join}{value}" for key, value in shown.items())
