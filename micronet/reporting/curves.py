"""The curves of trainings, from the metrics that they write beside their artifacts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from micronet.core.files import short_names
from micronet.core.parse import parse_json, read_text
from micronet.evaluation import plot
from micronet.reporting.charts import Chart, curves

ENDING = ".metrics.jsonl"
LARGEST = 16 * 2**20  # bytes
LOSS = ("loss", "validation_loss")
MOST_SERIES, MOST_METRICS = 8, 24
UNREAL = 1e100  # what no training reaches, and no chart can scale

Metrics = dict[str, dict[str, list[tuple[float, float]]]]  # metric -> run -> (epoch, value)


def read_metrics(files: Iterable[Path]) -> Metrics:
    """Return the loss and the metrics on the validation data by epoch, the main ones first.

    Args:
        files: Artifacts, which need not exist yet, or the files of metrics beside them; those that cannot be read are
            left out.
    """
    found: Metrics = {}
    given = map(Path.absolute, files)
    paths = dict.fromkeys(file if file.name.endswith(ENDING) else file.with_name(file.stem + ENDING) for file in given)
    for path, run in zip(paths, short_names(paths), strict=True):
        for row in _read(path):
            for name, value in row.items():
                if (name == "loss" or name.startswith("validation_")) and "/" not in name:
                    runs = found.setdefault(name, {})
                    runs.setdefault(run.removesuffix(ENDING), []).append((row["epoch"], value))
    return dict(sorted(found.items(), key=lambda item: (item[0] in LOSS, item[0] != "loss"))[:MOST_METRICS])


def training_charts(files: Iterable[Path]) -> list[Chart]:
    """Return a chart for each metric of ``read_metrics``."""
    return [
        curves(name.replace("_", " "), dict(list(runs.items())[:MOST_SERIES]), "epoch", name.replace("_", " "))
        for name, runs in read_metrics(files).items()
    ]


def draw(metrics: Metrics, path: Path) -> None:
    """Draw each metric by epoch, one beside the other, into a .png, .svg or .pdf file."""

    def fill(axes: Any) -> None:
        for axis, (name, runs) in zip(axes[0], metrics.items(), strict=True):
            for run, points in runs.items():
                axis.plot(*zip(*points, strict=True), ".-", label=plot.plain(run))
            axis.set_title(plot.plain(name.replace("_", " ")))
            axis.set_xlabel("epoch")
        axes[0][0].legend(fontsize=7)

    plot.draw(path, (5.0 * len(metrics), 3.6), fill, (1, len(metrics)))


def _read(path: Path) -> list[dict[str, float]]:
    """Return the numbers of each epoch; nothing if there is no such file, or it is not one that a training writes."""
    try:
        rows = [parse_json(line) for line in read_text(path, LARGEST).splitlines()]
    except (OSError, ValueError):
        return []
    numbers = [
        {key: float(value) for key, value in row.items() if isinstance(value, (int, float)) and abs(value) < UNREAL}
        for row in rows
        if isinstance(row, dict)
    ]
    return [row for row in numbers if "epoch" in row]
