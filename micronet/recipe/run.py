"""Running a recipe: stage by stage, unchanged ones skipped, interrupted ones continued."""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from micronet.core.config import group, setting, spell
from micronet.core.files import NOTE, file_hash, write_bytes
from micronet.core.machine import version
from micronet.core.parse import parse_json, read_text
from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError, unknown
from micronet.recipe.plan import Planned, plan
from micronet.recipe.reader import find_recipe, read_recipe
from micronet.stages.config import ReportConfig
from micronet.stages.execute import execute
from micronet.stages.keywords import as_keywords
from micronet.stages.stage import Context, Outcome, Stage

Perform = Callable[[Stage, bool, bool], Outcome]


@dataclass(frozen=True)
class RunRecipe(Stage):
    """Runs a recipe."""

    name = "run"
    details = (
        "Interrupted stages are resumed. Changes to images in a folder are not detected; after such changes, use "
        "--force. At the end, all files that the recipe created are compared."
    )
    example = "micronet run digits --output runs/digits"
    suffix = None
    product = "list[Row]"
    continues = True

    recipe: Path = setting(
        help="A TOML file, or the name of a bundled recipe such as digits.",
        argument=True,
        metavar="RECIPE",
        names="recipes",
    )
    output: Path | None = setting(
        None, "Folder for the results; default: the folder set in the recipe.", "-o", basic=True
    )
    data: str | None = setting(
        None, "Data set for the first stage that uses one; overrides the recipe's.", basic=True, names="data"
    )
    device: str | None = setting(None, "Device for every stage: cpu, cuda or cuda:N.", basic=True)
    from_stage: str | None = setting(
        None, "Rerun this stage and all later ones, even if they are unchanged.", basic=True, option="--from"
    )
    force: bool = setting(False, "Rerun every stage, even if it is unchanged.", basic=True)
    report: ReportConfig = group(ReportConfig)

    def run(self, context: Context) -> Outcome:
        """Run every stage with the library's own ``execute``."""

        def perform(stage: Stage, show: bool, last: bool) -> Outcome:
            outcome = execute(stage, context.progress)
            stage.judge(outcome)
            return outcome

        return run_recipe(self, perform, context.progress)


def run_recipe(
    config: RunRecipe, perform: Perform, progress: Progress | None = None, *, compares: bool = True
) -> Outcome:
    """Run a recipe's stages in order; return the last one's outcome.

    Args:
        perform: Runs one stage, and shows the result if its second argument is True; the third: whether it is the last.
        compares: Whether all files that the recipe makes are compared at its end.
    """
    recipe = read_recipe(find_recipe(config.recipe))
    recipe = replace(recipe, folder=config.output or recipe.folder)
    planned = plan(recipe, config.data, compares=compares)
    names = [each.entry.name for each in planned]
    if config.from_stage is not None and config.from_stage not in names:
        raise MicronetError(f"{recipe.path}: {unknown('stage', config.from_stage, names)}")
    from micronet.recipe.data import check_data  # imports torch

    check_data(recipe, planned)
    created = [folder for folder in (recipe.folder, *recipe.folder.parents) if not folder.exists()]
    recipe.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(recipe.folder)
    runner = _Runner(config, journal, perform, progress or Silent(), rerun=config.force)
    outcome = Outcome(None)
    for each in planned:
        try:
            outcome = runner.run(each, last=each is planned[-1])
        except MicronetError as error:
            where = f"stage {each.entry.name} ({recipe.path}, line {each.entry.line})"
            message = as_keywords(str(error), each.stage, recipe=True)
            error.args = (f"{where}: {message.replace('the same command with --resume', 'the same command again')}",)
            if created and [path.name for path in recipe.folder.iterdir()] in ([], [journal.path.name]):
                journal.path.unlink(missing_ok=True)
                for folder in created:
                    folder.rmdir()
            raise
    return outcome


@dataclass
class Journal:
    """The state of a recipe's folder: for each stage the hash of its settings and inputs, and of its output."""

    path: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """Read a folder's journal; return an empty one if there is none or it cannot be read."""
        path = folder / "recipe.json"
        try:
            entries = parse_json(read_text(path))
        except (OSError, ValueError):
            entries = {}
        sound = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
        return cls(path, entries if sound else {})

    def done(self, stage: str, key: str, output: Path) -> bool:
        """Return True if a stage finished with this key and its file has not changed since."""
        entry = self.entries.get(stage, {})
        return bool(entry.get("key") == key and output.exists() and entry.get("output") == file_hash(output))

    def begun(self, stage: str, key: str) -> bool:
        """Return True if a stage began with this key and did not finish."""
        return self.entries.get(stage) == {"key": key}

    def note(self, stage: str, key: str, output: Path | None = None) -> None:
        """Record that a stage begins or, with ``output``, that it has written that file."""
        self.entries[stage] = {"key": key} if output is None else {"key": key, "output": file_hash(output)}
        write_bytes(self.path, f"{json.dumps(self.entries, indent=2)}\n".encode())


@dataclass
class _Runner:
    """Runs planned stages. ``rerun``: whether to run even unchanged ones; set from ``from_stage`` on."""

    config: RunRecipe
    journal: Journal
    perform: Perform
    progress: Progress
    rerun: bool

    def run(self, each: Planned, *, last: bool) -> Outcome:
        """Run one stage unless its result is there already."""
        config, journal, name, path = self.config, self.journal, each.entry.name, each.output
        self.rerun = self.rerun or name == config.from_stage
        key = stage_key(each.stage.name, each.values, each.inputs, version())
        if path is not None and not self.rerun and journal.done(name, key, path):
            self.progress.line(f"{name}: unchanged, keeping {path}")
            return Outcome(None)
        words = ["micronet", each.stage.name, *spell(each.stage, each.values)]
        self.progress.line(f"$ {shlex.join(words)}")
        made_here = name in journal.entries
        if path is not None and path.exists() and not config.force and not made_here:
            raise MicronetError(
                f"{path} exists but was not created by this recipe; add --force to overwrite it, or choose another "
                "folder with -o"
            )
        resume = not self.rerun and journal.begun(name, key) and each.configured().trains()
        if path is not None:
            journal.note(name, key)
        as_json = config.report.json
        how: dict[str, Any]
        how = {"force": True, "resume": resume, "quiet": config.report.quiet or as_json, "json": as_json and last}
        if config.device is not None:
            how["device"] = config.device
        outcome = self.perform(each.configured(**how), last or not as_json, last)
        if path is not None:
            journal.note(name, key, path)
        return outcome


def stage_key(command: str, options: Mapping[str, Any], inputs: list[Path], version: str) -> str:
    """Return the hash of all that a stage's result depends on: command, settings, input files, micronet's version.

    A folder among the inputs counts by its name only, unless export wrote it.
    """
    files = [file_hash(path) for path in inputs if path.is_file() or (path / NOTE).is_file()]
    request = [version, command, sorted((key, str(value)) for key, value in options.items()), files]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
