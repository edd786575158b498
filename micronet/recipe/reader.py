"""Recipes: the command line's own commands as data, in order, in a TOML file.

::

    folder = "runs/nin"          # where results go; default: runs/<the recipe's name>

    [[stage]]
    command = "train"            # any command; its options are the stage's keys, spelled with _ or -
    name = "float"               # default: the command; results are NAME.safetensors or NAME.onnx
    width = 0.25

A stage's input is the artifact of the stage before, unless ``artifact = "NAME"`` names another. A network of the user's
own is named in the first stage only, ``model = "net.py:Net"``; later stages run the same code.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micronet.core.parse import LARGEST_RECIPE, parse_toml, read_text
from micronet.errors import MicronetError, unknown

_STAGE_HEADER = re.compile(r"^\s*\[\[\s*stage\s*\]\]")
_KEY = re.compile(r"""^\s*["']?([\w-]+)["']?\s*=""")
_TOP_KEYS = ("folder", "stage")
_OWN_KEYS = ("command", "name")
_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")  # in a wheel; in a checkout


@dataclass(frozen=True)
class Entry:
    """One stage of a recipe, as written; ``line`` is where it begins, ``lines`` where its settings are."""

    name: str
    command: str
    options: dict[str, Any]
    line: int
    lines: dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; its commands and settings are not checked yet."""

    path: Path
    folder: Path
    entries: list[Entry]

    def error(self, line: int, text: str) -> MicronetError:
        """Return the error for a mistake on a line of the file."""
        return MicronetError(f"{self.path}, line {line}: {text}")


def bundled() -> dict[str, Path]:
    """Return the recipes that come with micronet, by name."""
    return {path.stem: path for place in _PLACES for path in sorted(place.glob("*.toml"))}


def find_recipe(name: Path) -> Path:
    """Return the path of a recipe file, or of the bundled recipe of that name."""
    if name.suffix or (name.exists() and not name.is_dir()):
        return name
    recipes = bundled()
    if str(name) not in recipes:
        raise unknown("recipe", str(name), [*recipes, "path/to/recipe.toml"])
    return recipes[str(name)]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; raise MicronetError that names the line if it is not one."""
    try:
        text = read_text(path, LARGEST_RECIPE)
    except FileNotFoundError:
        raise MicronetError(f"{path} does not exist; bundled recipes: {', '.join(bundled())}") from None
    except OSError as error:
        raise MicronetError(f"{path} cannot be read ({error})") from error
    except ValueError as error:
        raise MicronetError(f"{path} is not a recipe in TOML: {error}") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Parse the text of a recipe; raise MicronetError that names the line of ``path`` if it is not one."""
    try:
        value = parse_toml(text)
    except ValueError as error:
        raise MicronetError(f"{path} is not a recipe in TOML: {error}") from error
    for key in value:
        if key not in _TOP_KEYS:
            raise MicronetError(f"{path}: {unknown('key', key, _TOP_KEYS)}")
    folder = value.get("folder", f"runs/{path.stem}")
    tables = value.get("stage", [])
    if not isinstance(folder, str) or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise MicronetError(f"{path}: folder must be a string, and every stage must be a [[stage]] table")
    if not tables:
        raise MicronetError(f'{path} has no stages; add one that starts with [[stage]] and command = "train"')
    recipe = Recipe(path, Path(folder), [])
    for table, lines in zip(tables, _lines(text, len(tables)), strict=True):
        recipe.entries.append(_entry(recipe, table, lines))
    return recipe


def _entry(recipe: Recipe, table: dict[str, Any], lines: dict[str, int]) -> Entry:
    line = lines.pop("", 1)
    command, name = table.get("command"), table.get("name", table.get("command"))
    if not isinstance(command, str):
        raise recipe.error(line, 'this stage has no command; add one, for example command = "train"')
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
        raise recipe.error(lines.get("name", line), "stage names can only contain letters, digits, - and _")
    if any(earlier.name == name for earlier in recipe.entries):
        raise recipe.error(
            lines.get("name", line),
            f'an earlier stage is also named {name!r}; give this one another name, for example "{name}-2"',
        )
    options: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _OWN_KEYS:
            option = key.replace("-", "_")
            if option in options:
                raise recipe.error(
                    lines.get(key, line), f"{option} is set twice, once spelled with - and once with _; remove one"
                )
            options[option] = value
    return Entry(name, command, options, line, {key.replace("-", "_"): number for key, number in lines.items()})


def _lines(text: str, count: int) -> list[dict[str, int]]:
    """Return, for each stage, the line of its header (under "") and of each of its keys."""
    found: list[dict[str, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if _STAGE_HEADER.match(line):
            found.append({"": number})
        elif found and (match := _KEY.match(line)):
            found[-1].setdefault(match[1], number)
    return found if len(found) == count else [{} for _ in range(count)]
