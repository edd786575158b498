"""The result of a command that writes a file."""

from typing import Any

from micronet.cli import console


def show(summary: dict[str, Any], config: Any) -> None:
    """Print the file, its size and the test accuracy if it was measured."""
    accuracy, images = summary.get("test_accuracy"), summary.get("test_images", 0)
    tested = f"  test accuracy {accuracy:.2%} on {images:,} images" if accuracy is not None else ""
    console.print_line(f"{line(summary)}{tested}")


def line(summary: dict[str, Any]) -> str:
    """Return the line that names the file and its size."""
    return f"wrote {summary['output']}  {summary['size_bytes']:,} bytes"
