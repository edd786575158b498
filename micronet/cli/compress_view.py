"""What ``compress`` prints: the candidates, what was given up, and the files."""

from typing import Any

from micronet.cli.console import print_line, print_table
from micronet.compression.words import table
from micronet.core.metrics import metric_label, value_text


def show_search(summary: dict[str, Any]) -> None:
    """Print a search's result, or its plan."""
    if "plan" in summary:
        for line in summary["plan"]:
            print_line(line)
        return
    heads, *rows = table(summary["candidates"], summary["chosen"]["name"])
    print_table(heads, rows)
    left_out = summary["left_out"]
    for line in summary["words"]:
        if line not in left_out or len(left_out) == 1:
            print_line(line)
    if len(left_out) > 1:  # the search said each
        print_line("no time for some candidates, which front.json names; a larger --budget would give it")
    before = summary["test_of_original"]
    figures = [
        f"{metric_label(name)} {value_text(name, value)} (original {value_text(name, before[name])})"
        for name, value in summary["test"].items()
    ]
    same = f" ({summary['tested_on']})" if summary["tested_on"] else ""
    print_line(f"test {summary['noun']}s, looked at once: {', '.join(figures)}{same}")
    print_line(f"wrote {summary['output']}: {', '.join(summary['names'])}")
