"""A recipe's entries bound to stages: every setting, file and the order of stages are checked before anything runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from micronet import registry
from micronet.artifact.header import Header, read_header
from micronet.core.config import Option, accepts, alternatives, describe, options
from micronet.errors import MicronetError, unknown
from micronet.recipe.reader import Entry, Recipe
from micronet.stages.keywords import spell_as_keywords
from micronet.stages.stage import Stage, find, uses

NO_FILE = Path("none")  # calib_data = "none"
OPTIONAL_DATA = ("prune", "import")  # stages that run without data


@dataclass(frozen=True)
class Planned:
    """An entry with its stage, its settings with files as paths, and the files that it writes and reads."""

    entry: Entry
    stage: type[Stage]
    values: dict[str, Any]
    output: Path | None
    inputs: list[Path]

    def configured(self, **run_only: Any) -> Stage:
        """Return the stage with its settings; ``run_only``: how it runs, applied if the stage has these settings."""
        known = {name: value for name, value in run_only.items() if uses(self.stage, name)}
        return self.stage.configure({**self.values, **known})


def plan(recipe: Recipe, data: str | None = None, *, compares: bool = True) -> list[Planned]:
    """Check every entry of a recipe and bind it to its stage.

    Args:
        recipe: The recipe.
        data: The data of the first stage that reads any, in place of the recipe's.
        compares: Whether a recipe that does not end in ``compare`` gets a comparison of all files that it makes.

    Raises:
        MicronetError: With the line: a name, a value, a file or the order of stages is invalid.
    """
    planner = _Planner(recipe)
    entries = list(recipe.entries)
    if compares and entries[-1].command != "compare":
        entries.append(Entry("compare", "compare", _inherited(entries), entries[-1].line, {}))
    for entry in entries:
        if entry.command not in registry.STAGES:
            line = entry.lines.get("command", entry.line)
            raise recipe.error(line, str(unknown("command", entry.command, registry.STAGES)))
        stage = find(entry.command)
        if data is not None and uses(stage, "data") and stage.name not in OPTIONAL_DATA:
            entry, data = replace(entry, options={**entry.options, "data": data}), None
        planner.add(entry, stage)
    return planner.planned


def _inherited(entries: list[Entry]) -> dict[str, Any]:
    """Return the settings that let the comparison at the end run the user's code that the stages before run."""
    given = {name: value for entry in entries for name, value in entry.options.items()}
    task = {"task": given["task"]} if ":" in str(given.get("task")) else {}
    trusts = given.get("trust_code") is True and ":" not in str(given.get("model"))  # a named copy runs instead
    return {**task, **({"trust_code": True} if trusts else {})}


class _Planner:
    """Binds entries one after the other, knowing what those before will have made."""

    def __init__(self, recipe: Recipe) -> None:
        self.planned: list[Planned] = []
        self._recipe = recipe
        self._made: dict[str, Path] = {}
        self._written: list[Path] = []  # the files and folders that stages write
        self._histories: dict[Path, list[str]] = {}
        self._chosen: set[Path] = set()  # networks that only a search knows the history of
        self._codes: dict[Path, str | None] = {}  # file -> the code that an entry named for it, if any
        self._tasks: dict[Path, str | None] = {}  # file -> its task, if that is the user's code

    def add(self, entry: Entry, stage: type[Stage]) -> None:
        """Bind one entry."""
        known = {option.name: option for option in options(stage)}
        values: dict[str, Any] = {}
        for name, value in entry.options.items():
            line = entry.lines.get(name, entry.line)
            if name not in known or known[name].about["run_only"]:
                names = [each.name for each in known.values() if not each.about["run_only"]]
                raise self._recipe.error(line, str(unknown(f"option of {entry.command}:", name, names)))
            values[name] = self._resolved(known[name], value, line)
        argument = next((option for option in known.values() if option.about["argument"]), None)
        if argument is not None and argument.name not in values:
            values = {**self._default_input(entry, argument), **values}
        read = [value for name, value in values.items() if name != "output" and not known[name].about["place"]]
        inputs = [path for value in read for path in _paths(value)]
        for path in inputs:
            if path not in self._made.values() and not path.exists() and path != NO_FILE:
                raise self._recipe.error(entry.line, str(unknown("stage or file", str(path), self._made)))
        files = [] if argument is None else _paths(values.get(argument.name))
        if argument is not None and not {"model", "trust_code"} & values.keys() and "trust_code" in known:
            values |= self._allowed_code(entry, files)
        task = values.get("task") or self._task_of(files)
        if task is not None and "task" in known:
            values["task"] = task
        output = self._bind(entry, stage, values, inputs)
        if made := self._made.get(entry.name):
            self._tasks[made] = task if ":" in (task or "") else None
        named = files_named({**entry.options, "task": task})
        self.planned.append(Planned(entry, stage, values, output, [*inputs, *named]))

    def _bind(self, entry: Entry, stage: type[Stage], values: dict[str, Any], inputs: list[Path]) -> Path | None:
        """Choose the output, configure the stage and check the order; return the output."""
        history = self._history(entry, values.get("artifact"))
        try:
            with spell_as_keywords(stage, recipe=True):
                configured = stage.configure(values)
            if history is not None:
                configured.check_order(history)
        except MicronetError as error:
            chosen = " (the network is what compress chose)" if values.get("artifact") in self._chosen else ""
            raise self._recipe.error(entry.line, f"{entry.command}: {error}{chosen}") from error
        suffix, output, made = configured.writes(), None, None
        if suffix is not None or _fills_folder(stage):
            place = self._recipe.folder / (entry.options.get("output") or f"{entry.name}{suffix or ''}")
            values["output"] = place
            output = None if suffix is None else place
            made = output or stage.configure(values).leaves()
            self._check_output(entry, place, suffix or "", inputs)
            if made is not None:
                self._check_unused(entry, made, inputs)
            self._written.append(place)
        if made is not None:
            self._made[entry.name] = made
            self._codes[made] = values["model"] if ":" in values.get("model", "") else None
            self._histories[made] = [*(history or []), *configured.records()]
            if output is None:
                self._chosen.add(made)
        return output

    def _allowed_code(self, entry: Entry, files: list[Path]) -> dict[str, Any]:
        """Return the settings that let the code run which builds a stage's inputs, as an earlier entry named it.

        Raises MicronetError if nothing names the code of a file that the recipe does not make.
        """
        networks = [path for path in files if path.suffix == ".safetensors"]
        codes = {self._codes.get(path) for path in networks}
        for name in [self._header(entry, path).model.get("name", "") for path in networks if path not in self._codes]:
            if ":" in name and not name.startswith("torchvision:"):
                raise self._recipe.error(
                    entry.line,
                    f'this stage needs custom code, {name}; add model = "{name}" to run your copy of it, or '
                    "trust_code = true if you trust the author of the file",
                )
        code = codes.pop() if len(codes) == 1 else None
        return {"model": code} if code else {"trust_code": True} if any(codes) else {}

    def _task_of(self, files: list[Path]) -> str | None:
        """Return the task of a stage's inputs if it is the user's code, which only a recipe may name, not a file."""
        tasks = {self._tasks.get(path) for path in files}
        return tasks.pop() if len(tasks) == 1 else None

    def _history(self, entry: Entry, path: Path | None) -> list[str] | None:
        """Return the stages that an input will have gone through; None if it is not an artifact."""
        if path is None or path in self._histories or path.suffix != ".safetensors":
            return self._histories.get(path) if path is not None else None
        return [record.stage for record in self._header(entry, path).history]

    def _header(self, entry: Entry, path: Path) -> Header:
        """Read the header of an artifact that the recipe does not make."""
        try:
            return read_header(path)[0]
        except MicronetError as error:
            raise self._recipe.error(entry.line, f"{entry.command}: {error}") from error

    def _check_output(self, entry: Entry, output: Path, suffix: str, inputs: list[Path]) -> None:
        """Raise MicronetError if a stage would overwrite a file that is read or written, or cannot write."""
        self._check_unused(entry, output, inputs)
        line = entry.lines.get("output", entry.line)
        if suffix and output.suffix != suffix:
            raise self._recipe.error(line, f"{output}: {entry.command} writes {suffix} files; rename it")
        if output.parent != self._recipe.folder and not output.parent.is_dir():
            raise self._recipe.error(
                line, f"the folder {output.parent} does not exist; create it with mkdir -p {output.parent}"
            )

    def _check_unused(self, entry: Entry, output: Path, inputs: list[Path]) -> None:
        """Raise MicronetError if a stage before writes a file or folder too, or this one reads it."""
        if output.resolve() in [path.resolve() for path in (*self._written, *self._made.values(), *inputs)]:
            raise self._recipe.error(
                entry.lines.get("output", entry.line),
                f"{output} is also the output of another stage or the input of this one; rename it",
            )

    def _default_input(self, entry: Entry, option: Option) -> dict[str, Any]:
        """Return the input of an entry that names none: the last artifact, or for compare all files made."""
        made = list(self._made.values())
        if option.name == "files":
            found: list[Path] | Path | None = made or None
        else:
            kinds = option.about["kinds"]
            suffix = ".safetensors" if ".safetensors" in kinds else kinds[0] if kinds else ""
            found = next((path for path in reversed(made) if path.suffix == suffix), None)
        if found is None and option.required:
            raise self._recipe.error(
                entry.line,
                f"{entry.command} needs {option.name}, but no earlier stage produces one; add it to this stage",
            )
        return {} if found is None else {option.name: found}

    def _resolved(self, option: Option, value: Any, line: int) -> Any:
        """Return a TOML value as the setting takes it; files by the name of the stage that makes them."""
        kinds = alternatives(option.field.type)
        if isinstance(value, list) and list[Path] in kinds and all(isinstance(item, str) for item in value):
            return [self._made.get(item, Path(item)) for item in value]
        if isinstance(value, str) and Path in kinds:
            return self._made.get(value, Path(value))
        if isinstance(value, int) and not isinstance(value, bool) and str in kinds and int not in kinds:
            return str(value)
        if not accepts(option.field.type, value):
            raise self._recipe.error(line, f"{option.name} is {value!r}; expected {describe(option.field.type)}")
        return value


def _fills_folder(stage: type[Stage]) -> bool:
    """Return True if a stage without a file of its own writes several into a folder."""
    places = [option.about["place"] for option in options(stage) if option.name == "output"]
    return stage.suffix is None and places == [None]


def files_named(settings: Mapping[str, Any]) -> list[Path]:
    """Return the files that text settings name: ``data = "x.npz"``, ``model = "net.py:Net"``."""
    texts = [value for value in settings.values() if isinstance(value, str)]
    named = [Path(part) for text in texts for part in (text, text.rpartition(":")[0]) if part]
    return [path for path in named if os.path.isfile(path)]  # noqa: PTH113 (Path.is_file raises OSError for long names)


def _paths(value: Any) -> list[Path]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Path)]
