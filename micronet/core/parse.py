"""Text from files that anyone may have written: read and parsed within bounds of size and depth."""

import json
import stat
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from micronet.core.config import accepts

R = TypeVar("R")

LARGEST_TEXT = 1 << 25  # bytes; parsed, it may take twenty times as much
LARGEST_RECIPE = 1 << 20  # bytes
DEEPEST = 64  # levels of lists and objects; code that walks them may recurse


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError if it is invalid, repeats a key, is over LARGEST_TEXT or deeper than DEEPEST."""
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"its JSON is larger than {LARGEST_TEXT:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise _too_deep() from None
    return _checked(value)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError if it is invalid or nested deeper than DEEPEST."""
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    _checked(value)
    return value


def spell_toml(value: Any) -> str:
    """Return a JSON value in TOML: strings are spelled as in JSON, with DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a text file as UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is a pipe or a device, is larger than ``largest`` bytes, or is not UTF-8.
    """
    check_regular(path)
    with path.open("rb") as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    return text.decode("utf-8")


def check_regular(path: Path) -> None:
    """Raise ValueError if a path is a pipe or a device, which may never end, and OSError if it does not exist."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device")


def make_record(record: type[R], value: Any) -> R:
    """Make a dataclass from a parsed JSON object whose names and types are its fields'; otherwise raise ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is not a JSON object")
    known = {item.name: item for item in fields(record)}  # type: ignore[arg-type]  # a dataclass
    for name, item in known.items():
        if name not in value and item.default is item.default_factory is MISSING:
            raise ValueError(f"{name!r} is missing")
    for name, part in value.items():
        if name not in known:
            raise ValueError(f"{name!r} is unknown")
        if not accepts(known[name].type, part):
            raise ValueError(f"{name!r} is {part!r:.40}")
    return record(**value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError if it has a key twice, of which another reader may take the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its JSON has {next(name for name in names if names.count(name) > 1)!r:.40} twice")
    return found


def _checked(value: Any) -> Any:
    """Return a parsed value; raise ValueError if it is nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
        if not level:
            return value
    raise _too_deep()


def _items(each: dict[str, Any] | list[Any]) -> Any:
    return each.values() if isinstance(each, dict) else each


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")
