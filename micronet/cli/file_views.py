"""What ``inspect`` and ``verify`` print: what files say of themselves, and whether it holds."""

from typing import Any

from micronet.cli.console import print_line, print_table
from micronet.core.image_size import spell_size
from micronet.errors import count


def show_inspection(summary: dict[str, Any]) -> None:
    """Print what a file says of itself, then one row per layer."""
    print_line(f"{summary['file']}  {summary['size_bytes']:,} bytes")
    about = summary.get("metadata", summary)  # of exported files, what micronet wrote beside the network
    _show_origin(about)
    if summary["kind"] != "artifact":
        _show_exported(summary)
    layers = [layer for layer in summary["layers"] if "shape" in layer]  # folders may have other descriptions
    if summary["kind"] == "artifact":
        heads: tuple[str, ...] = ("layer", "weight", "params", "bytes", "quantization")
        names: tuple[str, ...] = ("name", "shape", "params", "size_bytes", "quantization")
    else:
        heads = ("layer", "operator", "shape", "params", "bytes", "bits", "weight", "input", "integer")
        names = ("name", "operator", "shape", "params", "size_bytes", "bits", "weight", "input", "integer")
    if layers or summary["kind"] == "artifact":
        rows = [[_cell(layer[name]) for name in names] for layer in layers]
        print_table(heads, rows, optional=("params", "operator", "weight", "shape", "bytes"))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _show_origin(about: dict[str, Any]) -> None:
    """Print the network, the data, the history and the rest of a header; a foreign file has none of them."""
    model, data = about["model"], about["data"]
    if model:
        arguments = _pairs(model.get("args", {}), "=")
        print_line(f"model     {model['name']}{f'({arguments})' if arguments else ''}")
    if data and data.get("task"):
        print_line(f"task      {data['task']}")
    if data and data.get("inputs"):
        shapes = " and ".join(f"{each['dtype']} {each['shape']}" for each in data["inputs"])
        print_line(f"data      {data['name']}, inputs {shapes}")
    elif data and data.get("name") and data.get("image_size"):
        shape = f"{data.get('channels')}x{spell_size(data['image_size'])}"
        classes = count(len(data.get("classes") or []), "class")
        text = f"{classes}, {shape}, mean {data.get('mean')}, std {data.get('std')}"
        print_line(f"data      {data['name']}, {text}")
    if about["seed"] is not None:
        print_line(f"seed      {about['seed']}")
    if about["history"]:
        print_line("history")
    for number, record in enumerate(about["history"], 1):
        print_line(f"  {number}. {record['stage']}  {_pairs(record['config'], '=')}".rstrip())
    for name in ("metrics", "versions"):
        if about[name]:
            print_line(f"{name:<10}{_pairs(about[name], ' ')}")


def _show_exported(summary: dict[str, Any]) -> None:
    """Print the inputs, outputs, operators and sizes of an ONNX or packed file, or what is in a folder."""
    for name in ("inputs", "outputs"):
        for each in summary.get(name, []):
            shape = (
                "" if each["shape"] is None else "x".join("?" if side is None else str(side) for side in each["shape"])
            )
            print_line(f"{name.removesuffix('s'):<10}{each['name']}  {each['dtype']} {shape}".rstrip())
    for name, size in summary.get("files", {}).items():
        print_line(f"file      {name}  {size:,} bytes")
    lines = {
        "producer": summary.get("producer"),
        "opset": _pairs(summary.get("opsets", {}), " "),
        "target": summary.get("target"),
        "operators": _pairs(summary.get("operators", {}), " "),
        "params": f"{summary['params']:,}" if "params" in summary else None,
        "other": _pairs(summary.get("other_metadata", {}), " "),
    }
    if summary["layers"] and "integer_layers" in summary:
        lines["layers"] = f"{len(summary['layers'])}, {summary['integer_layers']} with integer weights and inputs"
    for name, text in lines.items():
        if text:
            print_line(f"{name:<10}{text}")


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
