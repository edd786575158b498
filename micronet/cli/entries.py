"""What ``doctor`` and ``list`` print: sections of names with a few words each."""

import os
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from micronet.cli import console
from micronet.stages.doctor_words import described

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
    show_sections(described(summary))
