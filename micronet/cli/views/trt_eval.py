"""The result of ``trt-eval``."""

from typing import Any

from micronet.cli import console

COLUMNS = ("input", "p50", "p95", "p99", "GPU alone", "images/s")


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the figures, then latency and throughput by batch size."""
    for label, value in _lines(summary):
        console.print_line(f"{label:<20}{value}")
    console.print_table(COLUMNS, [_cells(timing) for timing in summary["timings"]])


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("engine", f"{summary['backend']} {summary['version']}, {summary['precision']}"),
        ("GPU", summary["machine"]["gpu"]),
        ("file", f"{summary['size_bytes']:,} bytes"),
    ]
    if "accuracy" in summary:
        lines.append(("accuracy", f"{summary['accuracy']:.2%} of {summary['images']:,} images"))
        lines.append(("loss", f"{summary['loss']:.4f}"))
    else:
        lines.append(("pixel accuracy", f"{summary['pixel_accuracy']:.2%} of {summary['images']:,} images"))
        lines.append(("mean IoU", f"{summary['mean_iou']:.2%}"))
    if summary["agreement"] is not None:
        lines.append(("agrees with ONNX", f"{summary['agreement']:.2%}"))
    return lines


def _cells(timing: dict[str, Any]) -> list[str]:
    times = [f"{timing[key]:.2f} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "device_ms")]
    return ["x".join(map(str, timing["shape"])), *times, f"{timing['images_per_second']:,.0f}"]
