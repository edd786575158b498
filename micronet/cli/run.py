"""``micronet run``: a recipe, stage by stage."""

from pathlib import Path
from typing import Annotated

import typer

from micronet import registry
from micronet.cli import console
from micronet.cli.options import ReportOptions, with_configs
from micronet.errors import MicronetError, unknown

EXAMPLE = "micronet run configs/digits.toml --output runs/digits"


@with_configs
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; configs/ holds some.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; default: what the recipe says.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data of the first stage that takes any, instead of the recipe's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N, for every stage.")] = None,
    begin: Annotated[
        str | None, typer.Option("--from", help="Run this stage and all behind it, even where they are unchanged.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, even where it is unchanged.")] = False,
    *,
    report: ReportOptions,
) -> None:
    """Run a recipe's commands in order; skip those whose options and input files are unchanged; end in a compare.

    A stage that was killed goes on where it was. Images in a folder are not watched for changes: use --force.
    """
    from dataclasses import replace
    from importlib.metadata import version

    from micronet.cli import recipe_stages
    from micronet.recipe import Journal, read_recipe, stage_key

    read = read_recipe(recipe)
    read = replace(read, folder=output or read.folder)
    commands = {name: registry.load_object(each.module) for name, each in registry.COMMANDS.items() if name != "run"}
    stages = recipe_stages.bind(read, commands, data)
    names = [bound.stage.name for bound in stages]
    if begin is not None and begin not in names:
        raise MicronetError(f"{recipe}: {unknown('stage', begin, names)}")
    read.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(read.folder)
    anew = force
    quiet = report.quiet or report.json
    how = {"force": True, "quiet": quiet, **({} if device is None else {"device": device})}
    for bound in stages:
        stage, path = bound.stage, bound.output
        anew = anew or stage.name == begin
        key = stage_key(stage.command, bound.options, bound.inputs, version("micronet"))
        if path is not None and not anew and journal.done(stage.name, key, path):
            _say(f"{stage.name}: unchanged, {path} is kept", quiet)
            continue
        if report.json and path is None and bound is not stages[-1]:
            continue  # one JSON document, the last stage's
        _say(f"$ {bound.line()}", quiet)
        if path is not None and path.exists() and not force and not journal.owns(stage.name):
            raise MicronetError(f"{path} exists and this recipe did not make it; add --force to overwrite it, or -o")
        begun = bound.can_resume and not anew and journal.begun(stage.name, key)
        if path is not None:
            journal.note(stage.name, key)
        try:
            bound.run(**how, resume=begun, json=report.json and path is None)
        except MicronetError as error:
            error.args = (f"stage {stage.name} ({recipe}, line {stage.line}): {error}",)
            raise
        if path is not None:
            journal.note(stage.name, key, path)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        console.err.print(text, markup=False)
