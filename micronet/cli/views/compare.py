"""The result of ``compare``."""

from typing import Any

from micronet.cli import console

COLUMNS = (
    "name",
    "runtime",
    "accuracy",
    "drop",
    "agrees",
    "MACs",
    "params",
    "bytes",
    "smaller",
    "1 image",
    "64 images",
)


def show(summary: dict[str, Any], config: Any) -> None:
    """Print a table, or the same as Markdown."""
    rows = [cells(row) for row in summary["rows"]]
    if config.markdown:
        lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *rows]
        console.print_line("\n".join(f"| {' | '.join(line)} |" for line in lines))
    else:
        console.print_table(COLUMNS, rows, f"{summary['rows'][0]['images']:,} test images")


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row, one string per column."""
    return [
        row["name"],
        row["runtime"],
        f"{row['accuracy']:.2%}",
        f"{100 * row['drop']:+.2f} pt",
        f"{row['agreement']:.2%}",
        "?" if row["macs"] is None else f"{row['macs'] / 1e6:.1f} M",
        f"{row['params']:,}",
        f"{row['size_bytes']:,}",
        f"{row['compression']:.1%}",
        f"{row['latency_ms']:.2f} ms (p95 {row['latency_p95_ms']:.2f})",
        f"{row['latency_batch64_ms']:.1f} ms (p95 {row['latency_batch64_p95_ms']:.1f})",
    ]
