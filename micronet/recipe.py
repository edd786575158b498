"""Recipes: the command line's own commands as data, in order, in a TOML file.

::

    folder = "runs/nin"          # where results go; default runs/<the recipe's name>

    [[stage]]
    command = "train"            # any command; its options are the stage's keys, - written _ or -
    name = "float"               # default: the command; results are NAME.safetensors or NAME.onnx
    width = 0.25

A stage's input is the artifact of the stage before, unless it names another by ``artifact = "NAME"``. What was done is
remembered in the folder's ``recipe.json``, by a hash over options and input files; unchanged stages are skipped.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.files import file_hash, write_text
from micronet.errors import MicronetError, unknown

_STAGE_HEADER = re.compile(r"^\s*\[\[\s*stage\s*\]\]")
_KEY = re.compile(r"""^\s*["']?([\w-]+)["']?\s*=""")
_TOP_KEYS = ("folder", "stage")
_OWN_KEYS = ("command", "name")


@dataclass(frozen=True)
class Stage:
    """One command of a recipe. ``lines``: option -> line of the file; ``line``: where the stage begins."""

    name: str
    command: str
    options: dict[str, Any]
    line: int
    lines: dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, its commands and options not checked yet."""

    path: Path
    folder: Path
    stages: list[Stage]

    def error(self, line: int, text: str) -> MicronetError:
        """Return the error for a mistake on a line of the file."""
        return MicronetError(f"{self.path}, line {line}: {text}")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises MicronetError that names the line where it is no recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text)
    except FileNotFoundError:
        raise MicronetError(f"{path} does not exist; configs/ holds recipes to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MicronetError(f"{path} cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise MicronetError(f"{path} is no TOML: {error}") from error
    for key in value:
        if key not in _TOP_KEYS:
            raise MicronetError(f"{path}: {unknown('key', key, _TOP_KEYS)}")
    folder = value.get("folder", f"runs/{path.stem}")
    tables = value.get("stage", [])
    if not isinstance(folder, str) or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise MicronetError(f"{path}: folder is a string, every stage a table that begins with [[stage]]")
    if not tables:
        raise MicronetError(f'{path} has no stage; begin one with [[stage]] and command = "train"')
    recipe = Recipe(path, Path(folder), [])
    for table, lines in zip(tables, _lines(text, len(tables)), strict=True):
        recipe.stages.append(_stage(recipe, table, lines))
    return recipe


def _stage(recipe: Recipe, table: dict[str, Any], lines: dict[str, int]) -> Stage:
    line = lines.pop("", 1)
    command, name = table.get("command"), table.get("name", table.get("command"))
    if not isinstance(command, str):
        raise recipe.error(line, 'this stage names no command; add, for example, command = "train"')
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
        raise recipe.error(lines.get("name", line), "a stage's name is letters, digits, - and _, as its file will be")
    if any(earlier.name == name for earlier in recipe.stages):
        raise recipe.error(
            lines.get("name", line), f'there is a stage {name!r} before; name this one, for example "{name}-2"'
        )
    options: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _OWN_KEYS:
            option = key.replace("-", "_")
            if option in options:
                raise recipe.error(lines.get(key, line), f"{option} is there twice, once with - and once with _")
            options[option] = value
    return Stage(name, command, options, line, {key.replace("-", "_"): number for key, number in lines.items()})


def _lines(text: str, count: int) -> list[dict[str, int]]:
    """Return, for each stage, the line of its header (under "") and of each of its keys."""
    found: list[dict[str, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if _STAGE_HEADER.match(line):
            found.append({"": number})
        elif found and (match := _KEY.match(line)):
            found[-1].setdefault(match[1], number)
    return found if len(found) == count else [{} for _ in range(count)]


@dataclass
class Journal:
    """What was done in a recipe's folder: for each stage the hash of what it was asked, and of what it wrote."""

    path: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """Read a folder's journal; an empty one where there is none, or none that can be read."""
        path = folder / "recipe.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        sound = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
        return cls(path, entries if sound else {})

    def done(self, stage: str, key: str, output: Path) -> bool:
        """Tell whether a stage was finished with this key and its file is still the one it wrote."""
        entry = self.entries.get(stage, {})
        return bool(entry.get("key") == key and output.exists() and entry.get("output") == file_hash(output))

    def owns(self, stage: str) -> bool:
        """Tell whether a stage of this name was begun here before, so that its file may be written anew."""
        return stage in self.entries

    def begun(self, stage: str, key: str) -> bool:
        """Tell whether a stage was begun with this key and not finished."""
        return self.entries.get(stage) == {"key": key}

    def note(self, stage: str, key: str, output: Path | None = None) -> None:
        """Write down that a stage begins, or with ``output`` that it has written that file."""
        self.entries[stage] = {"key": key} if output is None else {"key": key, "output": file_hash(output)}
        text = json.dumps(self.entries, indent=2) + "\n"
        write_text(self.path, text)


def stage_key(command: str, options: Mapping[str, Any], inputs: list[Path], version: str) -> str:
    """Return the hash of all that a stage's result follows from: command, options, input files' bytes, our version.

    A folder among the inputs counts by its name alone.
    """
    files = [file_hash(path) for path in inputs if path.is_file()]
    asked = [version, command, sorted((key, str(value)) for key, value in options.items()), files]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
