"""Running a recipe: stage by stage, unchanged ones skipped, interrupted ones continued."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from micronet.core.config import group, setting, spell
from micronet.core.progress import Progress, Silent
from micronet.core.version import version
from micronet.errors import MicronetError, unknown
from micronet.recipe.journal import Journal, stage_key
from micronet.recipe.plan import Planned, plan
from micronet.recipe.reader import find_recipe, read_recipe
from micronet.stages.config import ReportConfig
from micronet.stages.execute import execute
from micronet.stages.stage import Outcome, Stage


@dataclass(frozen=True)
class RunRecipeSettings:
    """The settings of ``run``."""

    recipe: Path = setting(
        help="A TOML file, or the name of a bundled recipe, for example digits.", argument=True, metavar="RECIPE"
    )
    output: Path | None = setting(None, "Folder for the results; default: the recipe's.", "-o", basic=True)
    data: str | None = setting(None, "Data for the first stage that reads any, in place of the recipe's.", basic=True)
    device: str | None = setting(None, "cpu, cuda or cuda:N, for every stage.", basic=True)
    from_stage: str | None = setting(
        None, "Run this stage and all later ones, even if they are unchanged.", basic=True, option="--from"
    )
    force: bool = setting(False, "Run every stage, even if it is unchanged.", basic=True)
    report: ReportConfig = group(ReportConfig)


Perform = Callable[[Stage, Any, bool], Outcome]


class RunRecipe(Stage):
    """Runs a recipe."""

    name = "run"
    details = (
        "A stage that was interrupted continues. Images in a folder are not checked for changes: use --force. A recipe "
        "ends with a comparison of all files that it made."
    )
    example = "micronet run digits --output runs/digits"
    Config = RunRecipeSettings
    suffix = None
    product = "list[Row]"

    def run(self, config: Any, context: Any) -> Outcome:
        """Run every stage with the library's own ``execute``."""

        def perform(stage: Stage, settings: Any, show: bool) -> Outcome:
            outcome = execute(stage, settings, context.progress)
            stage.judge(settings, outcome)
            return outcome

        return run_recipe(config, perform, context.progress)


def run_recipe(config: RunRecipeSettings, perform: Perform, progress: Progress | None = None) -> Outcome:
    """Run a recipe's stages in order; return the last one's outcome.

    Args:
        config: Which recipe, and how.
        perform: Runs one stage with its config, and shows the result if its third argument says so.
        progress: Where it reports which stage runs.
    """
    progress = progress or Silent()
    recipe = read_recipe(find_recipe(config.recipe))
    recipe = replace(recipe, folder=config.output or recipe.folder)
    planned = plan(recipe, config.data)
    names = [each.entry.name for each in planned]
    if config.from_stage is not None and config.from_stage not in names:
        raise MicronetError(f"{recipe.path}: {unknown('stage', config.from_stage, names)}")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    runner = _Runner(config, Journal.open(recipe.folder), perform, progress)
    outcome = Outcome(None)
    for each in planned:
        try:
            outcome = runner.run(each, last=each is planned[-1])
        except MicronetError as error:
            error.args = (f"stage {each.entry.name} ({recipe.path}, line {each.entry.line}): {error}",)
            raise
    return outcome


class _Runner:
    """Runs planned stages; after the first that is not skipped by choice, none is."""

    def __init__(self, config: RunRecipeSettings, journal: Journal, perform: Perform, progress: Progress) -> None:
        self._config, self._journal, self._perform, self._progress = config, journal, perform, progress
        self._rerun = config.force

    def run(self, each: Planned, *, last: bool) -> Outcome:
        """Run one stage unless its result is there already."""
        config, journal, name, path = self._config, self._journal, each.entry.name, each.output
        self._rerun = self._rerun or name == config.from_stage
        key = stage_key(each.stage.name, each.values, each.inputs, version())
        if path is not None and not self._rerun and journal.done(name, key, path):
            self._progress.line(f"{name}: unchanged, keeping {path}")
            return Outcome(None)
        self._progress.line(f"$ {command_line(each.stage, each.values)}")
        if path is not None and path.exists() and not config.force and not journal.owns(name):
            raise MicronetError(f"{path} exists but this recipe did not make it; add --force to overwrite it, or -o")
        resume = not self._rerun and journal.begun(name, key) and each.stage.trains(each.config())
        if path is not None:
            journal.note(name, key)
        how: dict[str, Any] = {"force": True, "resume": resume, "quiet": config.report.quiet or config.report.json}
        how |= {"json": config.report.json and last}
        if config.device is not None:
            how["device"] = config.device
        outcome = self._perform(each.stage, each.config(**how), last or not config.report.json)
        if path is not None:
            journal.note(name, key, path)
        return outcome


def command_line(stage: Stage, values: dict[str, Any]) -> str:
    """Return the command line that does the same as a stage with these settings."""
    return shlex.join(["micronet", stage.name, *spell(stage.Config, values)])


RUN = RunRecipe()
