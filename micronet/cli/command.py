"""A command line made from a stage's settings: its options, its help, and running it."""

import inspect
from collections.abc import Callable
from signal import SIGINT
from types import NoneType
from typing import Annotated, Any

import typer

from micronet.cli import console, views
from micronet.cli.process import SIGNALS, cause, ending_in_order
from micronet.core import ranks
from micronet.core.config import Option, alternatives, changed, flag, flatten, spell
from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.stages.execute import execute
from micronet.stages.launch import run_in_processes
from micronet.stages.stage import Outcome, Stage

BASIC = "Options"


class Interrupted(MicronetError):
    """Ctrl-C or SIGTERM, with what to do to continue; the exit code is 128 and the signal's number, as in shells."""

    def __init__(self, stop: KeyboardInterrupt, stage: Stage) -> None:
        number = stop.args[0] if stop.args else SIGINT
        self.exit_code = 128 + number
        words = cause(number)
        if stage.trains() or stage.continues:
            again = " with --resume" if stage.trains() else ""
            words += f"; all files are intact. To continue, run the same command{again}"
        super().__init__(words)


def command(kind: type[Stage]) -> Callable[..., None]:
    """Return the function that Typer makes a command of: one parameter for each of a stage's settings."""

    def run(**values: Any) -> None:
        stage = kind.configure(values)
        try:
            with ending_in_order():
                perform(stage)
        except KeyboardInterrupt as stop:
            if ranks.is_launched():  # the launcher says so, once
                raise
            raise Interrupted(stop, stage) from None

    parameters = [_parameter(option, basic=kind.is_basic(option)) for option in kind.options()]
    run.__doc__ = f"{kind.summary()}\n\n{kind.details}".strip()
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def perform(stage: Stage, show: bool = True, last: bool = True) -> Outcome:
    """Run a stage in as many processes as its settings ask for, and print what it made if ``show``.

    ``last``: whether no other stage follows, so that the command to run next is printed, too.
    """
    outcome = Outcome(None)

    def work() -> None:
        nonlocal outcome
        outcome = _run_here(stage, show, last)

    # -P: the new processes import nothing from this folder
    program = ["-P", "-m", "micronet.cli.app", stage.name, *spell(type(stage), changed(stage))]
    if code := run_in_processes(work, stage.processes(), program, console.report_error):
        if code - 128 in SIGNALS:
            raise KeyboardInterrupt(code - 128)
        raise typer.Exit(code)
    return outcome


def _run_here(stage: Any, show: bool, last: bool) -> Outcome:
    settings = flatten(stage)
    quiet, as_json = settings.get("quiet", False), settings.get("json", False)
    if stage.name == "run":
        from micronet.recipe.run import run_recipe

        return run_recipe(stage, perform, Silent() if quiet or as_json else console.Bar())
    if stage.name == "init":
        from micronet.cli.ask import answered

        stage = answered(stage)
    with console.progress(quiet) as progress:
        outcome = execute(stage, progress)
    if not last and isinstance(outcome.summary, dict):
        outcome.summary.pop("next", None)
    if show and as_json:
        console.print_json(outcome.summary)
    elif show and not (quiet and stage.writes()):
        views.show(stage, outcome.summary)
    stage.judge(outcome)
    return outcome


def _parameter(option: Option, *, basic: bool) -> inspect.Parameter:
    """Return the parameter of a command's function for one setting."""
    about, kind = option.about, option.field.type
    # Typer knows no unions of several types: such settings are text, and the config makes sense of it.
    several = len([one for one in alternatives(kind) if one is not NoneType]) > 1
    default = inspect.Parameter.empty if option.required else option.default
    if several:
        kind, default = (str | None, None) if option.default is None else (str, str(option.default))
    elif option.default is not None and not option.required and kind is float:
        default = float(option.default)
    text = about["help"]
    if option.default is not None:
        text = text.partition(" Default: ")[0]  # that of the other stages; Typer shows this one's
    shared = {"help": text, "metavar": about["metavar"], "autocompletion": _completion(about["names"])}
    if about["argument"]:
        declared: Any = typer.Argument(**shared, show_default=False)
    else:
        names = [about["option"] or flag(option.name), *filter(None, [about["short"]])]
        panel = BASIC if basic else f"Advanced: {option.title or 'This command'}"
        declared = typer.Option(*names, **shared, rich_help_panel=panel)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _completion(kind: str | None) -> Callable[[str], list[str]] | None:
    """Return what completes the names of a kind in shells, or None, which leaves the completion to Typer."""

    def names(incomplete: str) -> list[str]:
        from micronet.recipe.list_names import names_of

        return [name for name in names_of(kind or "") if name.startswith(incomplete)]

    return names if kind else None
