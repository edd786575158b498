"""The page: what was measured, arranged, and written as one HTML file that needs no network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.files import write_bytes
from micronet.core.metrics import metric_label, value_text
from micronet.errors import visible
from micronet.evaluation.report import Row
from micronet.reporting.charts import COLORS, HEIGHT, WIDTH, Chart
from micronet.reporting.layers import Layer
from micronet.reporting.pictures import Disagreement

RUNTIME = "runtime"  # a column of text, as the first one
TEMPLATE = Path(__file__).with_name("page.html")
# The heads of the figures of layers -> their attributes, and how they are spelled.
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes": ("size_bytes", "{:,}".format),
    "MACs": ("macs", "{:,}".format),
    "ms": ("latency_ms", "{:.3f}".format),
    "SNR, dB": ("snr_db", lambda value: value_text("snr_db", value).removesuffix(" dB")),
}


@dataclass(frozen=True)
class Cell:
    """A figure in the table: its text, and the number to sort by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Section:
    """A network: its name, the commands that made it, and its layers."""

    name: str
    made: list[str]
    layers: list[Layer]

    @property
    def figures(self) -> list[str]:
        """The heads of the figures that are known of any layer."""
        return [
            head for head, (name, _) in FIGURES.items() if any(getattr(each, name) is not None for each in self.layers)
        ]

    def cells(self, layer: Layer) -> list[Cell]:
        """Return these figures of a layer; those that are not known are empty and the least."""
        known = [(getattr(layer, FIGURES[head][0]), FIGURES[head][1]) for head in self.figures]
        return [Cell("", -1) if value is None else Cell(spell(value), value) for value, spell in known]


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    verdict: str
    warnings: list[str]  # why the measurements may mislead, and what is not there
    words: list[str]
    rows: Sequence[Row]
    chosen: int
    tested_on: str  # such as "1,000 test images"
    charts: list[Chart]
    sections: list[Section]
    disagreement: Disagreement | None
    about: dict[str, str] = field(default_factory=dict)  # the machine, the versions, the command

    @property
    def columns(self) -> list[str]:
        """The heads of the table."""
        return [name for name, _ in _cells(self.rows[0], list(self.rows[0].metrics))]

    @property
    def table(self) -> list[list[Cell]]:
        """The cells of each row."""
        return [[cell for _, cell in _cells(row, list(self.rows[0].metrics))] for row in self.rows]


def write_page(path: Path, page: Page) -> None:
    """Write a page; raise FailedError if the disk is full."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda value: f"{value:,}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(page=page, width=WIDTH, height=HEIGHT, colors=range(COLORS), runtime=RUNTIME)
    write_bytes(path, visible(text, keep="\n").encode())


def _cells(row: Row, metrics: list[str]) -> list[tuple[str, Cell]]:
    """Return the heads and cells of a row; ``metrics``: what the table has of a task's own."""
    cells = [("network", Cell(row.name, row.name))]
    if row.accuracy is not None:
        cells.append(("accuracy", Cell(f"{row.accuracy:.2%}", row.accuracy)))
        cells.append(("change", Cell(f"{-100 * row.drop + 0.0:+.2f} pt", -row.drop)))
    else:
        found = {name: row.metrics.get(name, math.nan) for name in metrics if "/" not in name}
        cells += [(metric_label(name), Cell(value_text(name, value), value)) for name, value in found.items()]
    cells.append(("bytes", Cell(f"{row.size_bytes:,}", row.size_bytes)))
    cells.append(("smaller", Cell(f"{row.compression:.1%}", row.compression)))
    if row.latency_ms is not None:
        cells.append(("ms, batch 1", Cell(f"{row.latency_ms:.2f}", row.latency_ms)))
    if row.latency_batch64_ms is not None:
        cells.append(("ms, batch 64", Cell(f"{row.latency_batch64_ms:.1f}", row.latency_batch64_ms)))
    cells.append((RUNTIME, Cell(row.runtime, row.runtime)))
    if row.agreement is not None:
        cells.append(("same class", Cell(f"{row.agreement:.2%}", row.agreement)))
    cells.append(("MACs", Cell("?" if row.macs is None else f"{row.macs / 1e6:.1f} M", row.macs or 0)))
    cells.append(("parameters", Cell(f"{row.params:,}", row.params)))
    return cells
