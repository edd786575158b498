"""What ``doctor`` and ``list`` print: sections of names with a few words each."""

import os
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from micronet.cli import console
from micronet.errors import count, listed

GIB = 1 << 30
INDENT, LONGEST = 2, 20  # characters; a longer name has a line of its own


def show_sections(sections: Mapping[str, Mapping[str, str]]) -> None:
    """Print titles, and below each its names with their words, wrapped at the terminal's width."""
    for title, entries in sections.items():
        console.print_line(title)
        for name, words in entries.items():
            show_entry(name, words, min(LONGEST, max(map(len, entries))))


def show_entry(name: str, words: str, column: int) -> None:
    """Print a name and its words, which begin at a column and stay there in further lines."""
    terminal = console.out.is_terminal or "COLUMNS" in os.environ
    width = max(column + 20, console.out.width - 1) if terminal else console.WIDTH
    start = column + 2 * INDENT
    lines = wrap(console.plain(words), width - start, break_long_words=False, break_on_hyphens=False) or [""]
    if len(name) > column:
        lines = ["", *lines]
    for number, line in enumerate(lines):
        console.print_line(f"{' ' * INDENT}{'' if number else name:<{column + INDENT}}{line}".rstrip())


def show_doctor(summary: dict[str, Any]) -> None:
    """Print what was found of the machine, what is fast here and what is not, and what to install."""
    processor, memory, cache = summary["processor"], summary["memory"], summary["kernel_cache"]
    features = processor["features"]
    [torch] = [each for each in summary["packages"] if each["name"] == "torch"]
    cores = count(processor["cores"], "usable core")
    machine = {
        "micronet": f"{summary['micronet']}, Python {summary['python']}, {summary['system']}",
        "processor": f"{processor['name']}, {cores}, {count(processor['threads'], 'thread')}",
        "has": " ".join(name for name, own in features.items() if own) or "unknown features",
        "memory": f"{memory['free_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB free",
        "GPU": listed(torch.get("gpus") or ["none that torch can use"], 4),
        "C compiler": summary["compilers"]["cc"] or "none",
        "for aarch64": summary["compilers"]["aarch64"] or "none",
        "kernels": f"{cache['folder']}, {'writable' if cache['writable'] else cache['problem']}",
    }
    packages, missing = {}, {}
    for each in summary["packages"]:
        if each["version"] is not None:
            extra = ", ".join(each.get("providers") or each.get("devices") or [])
            packages[each["name"]] = f"{each['version']} ({extra})" if extra else each["version"]
        else:
            problem = f"broken: {each['problem']}; " if "problem" in each else ""
            missing[each["name"]] = f"{problem}for {each['purpose']}: {each['install']}"
    console.print_line("machine")
    for title, entries in (("", machine), ("packages", packages), ("missing", missing)):
        if entries and title:
            console.print_line(title)
        for name, words in entries.items():
            show_entry(name, words, len("tensorrt_rtx"))
    for fast, title in ((True, "fast here"), (False, "slow or missing here")):
        if texts := [each["text"] for each in summary["advice"] if each["fast"] is fast]:
            console.print_line(title)
            for text in texts:
                show_entry("-", text, 1)
