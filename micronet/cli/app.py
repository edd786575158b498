"""The ``micronet`` command: its subcommands, and the one place where errors become a line and an exit code.

Exit codes: 0 success; 1 failure; 2 user error; 3 stopped by --max-time; 130 Ctrl-C; 143 SIGTERM. Nothing here imports
torch, so ``--help`` is fast.
"""

import io
import os
import sys
import warnings
from collections.abc import Collection
from contextlib import nullcontext, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from micronet import registry
from micronet.cli import console, process
from micronet.cli.old_spellings import modern
from micronet.cli.usage import usage_error
from micronet.core import ranks
from micronet.errors import USER_ERRORS, is_out_of_memory

_UsageError: Any = typer.BadParameter.__base__  # click's; newer Typers bring it themselves


class _Command(TyperCommand):
    """A command's name and summary; its stage is imported, and Typer's command built, only if it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return a context of the command itself."""
        return _build(str(self.name)).make_context(info_name, args, parent, **extra)


@cache
def _build(name: str) -> Any:
    """Return Typer's command of that name."""
    from micronet.cli.command import command

    stage = registry.load_object(registry.COMMANDS[name].stage)
    single = typer.Typer(add_completion=False, **_LOOK)
    single.command(name, cls=_Parsed, epilog=f"Example:  {stage.example}")(command(stage))
    built: Any = typer.main.get_command(single)
    built.paths = {option.name for option in stage.options() if option.field.type is Path}
    return built


class _Parsed(TyperCommand):
    """Typer's command of a stage, with the names of its settings that are a path."""

    paths: Collection[str] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        return [_light(each, self.paths) for each in super().get_params(ctx)]


def _light(parameter: Any, paths: Collection[str] = ()) -> Any:
    """Let a parameter take None and a path as they are: Typer imports pydantic for it, a third of a short command."""
    convert = parameter.process_value

    def process_value(context: Any, value: Any) -> Any:
        if parameter.name in paths and isinstance(value, str):
            return Path(value)
        return None if value is None and not parameter.required else convert(context, value)

    if "process_value" not in vars(parameter) and parameter.nargs == 1 and not parameter.multiple:
        parameter.process_value = process_value
    return parameter


class _Group(TyperGroup):
    """Typer's group over commands that are imported late, which saves a fifth of a command's response time."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: _Command(name, help=each.summary) for name, each in registry.COMMANDS.items()}

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        return [_light(each) for each in super().get_params(ctx)]


_LOOK: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="micronet",
    cls=_Group,
    help="Make neural networks small and fast, and deploy them.\n\nMost commands read an artifact (a .safetensors "
    "file), do one thing and write a new file.",
    **_LOOK,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from micronet.core.machine import version

        console.print_line(f"micronet {version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit."""
    process.end_at_once()
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"torch(vision)?\.")  # about their own future, not the user's network
    code = run(sys.argv[1:])
    if ranks.is_distributed():  # threads of torch's process group that outlive the interpreter would abort the process
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every error that a user can cause ends here.

    In distributed runs, only rank 0 prints results and errors of the command line.
    """
    try:
        ranks.check_environment()
        words = modern(arguments) or ["--help"]
        with nullcontext() if ranks.rank() == 0 else redirect_stdout(io.StringIO()):
            code = app(words, prog_name="micronet", standalone_mode=False) or 0
    except SystemExit as stop:  # shell completion, and a reader that closed the pipe
        return stop.code if isinstance(stop.code, int) else 1
    except _UsageError as error:
        return report(usage_error(error, words))
    except USER_ERRORS as error:
        return report(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return report(error)
    return code if arguments else 2


def report(error: Exception) -> int:
    """Print an error, unless another rank does; return its exit code."""
    return console.report_error(error) if ranks.rank() == 0 else getattr(error, "exit_code", 1)


if __name__ == "__main__":
    main()
