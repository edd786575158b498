"""The curves of trainings, from the metrics that they write beside their artifacts."""

import math
from collections.abc import Iterable
from pathlib import Path

from micronet.core.parse import parse_json, read_text
from micronet.report.charts import Chart, curves

ENDING = ".metrics.jsonl"
LARGEST = 16 * 2**20  # bytes
LOSS = ("loss", "validation_loss")
MOST_SERIES = 8


def training_charts(files: Iterable[Path]) -> list[Chart]:
    """Return a chart of the loss, and one for each metric on the validation data.

    Args:
        files: Artifacts, or other files beside which there may be no metrics. Metrics that cannot be read are left out.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for path in dict.fromkeys(file.with_name(file.stem + ENDING) for file in files):
        for row in _read(path):
            for name, value in row.items():
                if (name == "loss" or name.startswith("validation_")) and "/" not in name:
                    found.setdefault(name, {}).setdefault(path.name.removesuffix(ENDING), []).append(
                        (row["epoch"], value)
                    )
    order = sorted(found, key=lambda name: (name in LOSS, name != "loss"))
    return [
        curves(name.replace("_", " "), dict(list(found[name].items())[:MOST_SERIES]), "epoch", name.replace("_", " "))
        for name in order
    ]


def _read(path: Path) -> list[dict[str, float]]:
    """Return the numbers of each epoch; nothing if there is no such file, or it is not one that a training writes."""
    try:
        rows = [parse_json(line) for line in read_text(path, LARGEST).splitlines()]
    except (OSError, ValueError):
        return []
    numbers = [
        {key: float(value) for key, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for row in rows
        if isinstance(row, dict)
    ]
    return [row for row in numbers if "epoch" in row]
