"""The result of ``sensitivity``."""

import math
from typing import Any

from micronet.cli import console

BAR = 40  # characters


def show(summary: list[dict[str, Any]], config: Any) -> None:
    """Print one row per layer, with a bar as long as its signal-to-noise ratio."""
    largest = max((row["sqnr_db"] for row in summary if math.isfinite(row["sqnr_db"])), default=1.0)
    rows = [
        (
            row["layer"],
            f"{row['sqnr_db']:.1f} dB",
            "█" * max(0, round(BAR * min(1, row["sqnr_db"] / largest))),
            f"{100 * row['drop']:+.2f} pt",
        )
        for row in summary
    ]
    console.print_table(("layer", "SQNR", "", "drop alone"), rows)
