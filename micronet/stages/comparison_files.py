"""The rows of a comparison as CSV, and what its gates say of them as JUnit XML, for CI servers."""

import io
from collections.abc import Sequence
from csv import writer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as xml

from micronet.core.files import write_bytes
from micronet.errors import visible
from micronet.stages.gates import Verdict

if TYPE_CHECKING:
    from micronet.evaluation.report import Row

SUITE = "micronet compare"
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet computes; tabs and line ends are escaped anyway


def write_files(rows: "Sequence[Row]", found: Sequence[Verdict], *, csv: Path | None, junit: Path | None) -> None:
    """Write the files that are asked for."""
    if csv is not None:
        write_csv(csv, rows)
    if junit is not None:
        write_junit(junit, found)


def write_csv(path: Path, rows: "Sequence[Row]") -> None:
    """Write one line for each network: the fields of ``Row``, with the task's own metrics behind them.

    Names that a spreadsheet would take for formulas begin with an apostrophe.
    """
    own = [name for name in rows[0].metrics if name not in rows[0]._fields]
    names = [name for name in rows[0]._fields if name != "metrics"]
    text = io.StringIO()
    lines = writer(text)
    lines.writerow(map(_cell, [*names, *own]))
    for row in rows:
        values = {**row._asdict(), "stages": " ".join(row.stages), **{name: row.metrics.get(name) for name in own}}
        lines.writerow(_cell(values.get(name)) for name in names + own)
    write_bytes(path, text.getvalue().encode())


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def write_junit(path: Path, found: Sequence[Verdict]) -> None:
    """Write one test case for each network and gate (https://github.com/testmoapp/junitxml)."""
    counts = {"tests": str(len(found)), "failures": str(sum(bool(each.problem) for each in found)), "errors": "0"}
    root = xml.Element("testsuites", {"name": SUITE, **counts})
    suite = xml.SubElement(root, "testsuite", {"name": SUITE, **counts, "skipped": "0", "time": "0"})
    for each in found:
        name, gate = visible(each.network), f"{each.gate} {each.limit:,.10g}"
        case = xml.SubElement(suite, "testcase", classname=name, name=f"{name} {gate}", time="0")
        if each.problem:
            message = visible(f"{each.network} {each.problem}")
            xml.SubElement(case, "failure", message=message, type=each.gate).text = message
    xml.indent(root)
    write_bytes(path, xml.tostring(root, "utf-8", xml_declaration=True))
