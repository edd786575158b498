"""The result of ``evaluate``."""

from typing import Any

from micronet.cli import console


def show(summary: dict[str, Any], config: Any) -> None:
    """Print one figure per line."""
    one, many = (f"{summary[f'latency_{key}ms']:.2f} ms" for key in ("", "batch64_"))
    for label, value in (
        ("accuracy", f"{summary['accuracy']:.2%} of {summary['images']:,} images"),
        ("loss", f"{summary['loss']:.4f}"),
        ("latency, 1 image", f"{one}, p95 {summary['latency_p95_ms']:.2f} ms"),
        ("latency, 64 images", f"{many}, p95 {summary['latency_batch64_p95_ms']:.2f} ms"),
        ("file", f"{summary['size_bytes']:,} bytes"),
        ("parameters", f"{summary['params']:,}"),
        ("runtime", summary["runtime"]),
    ):
        console.print_line(f"{label:<20}{value}")
