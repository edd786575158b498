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
from micronet.stages.stage import Context, Outcome, Stage

Perform = Callable[[Stage, bool], Outcome]


@dataclass(frozen=True)
class RunRecipe(Stage):
    """Runs a recipe."""

    name = "run"
    details = (
        "A stage that was interrupted continues. Images in a folder are not checked for changes: use --force. A recipe "
        "ends with a comparison of all files that it made."
    )
    example = "micronet run digits --output runs/digits"
    suffix = None
    product = "list[Row]"

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

    def run(self, context: Context) -> Outcome:
        """Run every stage with the library's own ``execute``."""

        def perform(stage: Stage, show: bool) -> Outcome:
            outcome = execute(stage, context.progress)
            stage.judge(outcome)
            return outcome

        return run_recipe(self, perform, context.progress)


def run_recipe(config: RunRecipe, perform: Perform, progress: Progress | None = None) -> Outcome:
    """Run a recipe's stages in order; return the last one's outcome.

    Args:
        config: Which recipe, and how.
        perform: Runs one stage, and shows the result if its second argument says so.
        progress: Where it reports which stage runs.
    """
    recipe = read_recipe(find_recipe(config.recipe))
    recipe = replace(recipe, folder=config.output or recipe.folder)
    planned = plan(recipe, config.data)
    names = [each.entry.name for each in planned]
    if config.from_stage is not None and config.from_stage not in names:
        raise MicronetError(f"{recipe.path}: {unknown('stage', config.from_stage, names)}")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    runner = _Runner(config, Journal.open(recipe.folder), perform, progress or Silent(), rerun=config.force)
    outcome = Outcome(None)
    for each in planned:
        try:
            outcome = runner.run(each, last=each is planned[-1])
        except MicronetError as error:
            error.args = (f"stage {each.entry.name} ({recipe.path}, line {each.entry.line}): {error}",)
            raise
    return outcome


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
        if path is not None and path.exists() and not config.force and not journal.owns(name):
            raise MicronetError(f"{path} exists but this recipe did not make it; add --force to overwrite it, or -o")
        resume = not self.rerun and journal.begun(name, key) and each.configured().trains()
        if path is not None:
            journal.note(name, key)
        json = config.report.json
        how: dict[str, Any]
        how = {"force": True, "resume": resume, "quiet": config.report.quiet or json, "json": json and last}
        if config.device is not None:
            how["device"] = config.device
        outcome = self.perform(each.configured(**how), last or not json)
        if path is not None:
            journal.note(name, key, path)
        return outcome
