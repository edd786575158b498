"""The ``micronet`` command: its subcommands and the one place where errors become a line and an exit code.

Exit codes: 0 done; 1 failed; 2 the user's mistake; 3 stopped at --max-time; 130 interrupted. Nothing here imports
torch, so ``--help`` is fast.
"""

import os
import sys
from typing import Annotated

import typer

from micronet import ranks
from micronet.cli import (
    bn_fuse,
    check_onnx,
    compare,
    console,
    evaluate,
    export_onnx,
    finetune,
    import_model,
    inspect_artifact,
    pack,
    predict,
    prune,
    quantize,
    sensitivity,
    sparse_train,
    train,
    trt_build,
    trt_eval,
)
from micronet.cli import run as run_recipe
from micronet.cli.old_spellings import modern
from micronet.errors import MicronetError

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="micronet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a neural network small and fast and put it into production.\n\n"
    "Every command reads an artifact (one .safetensors file), does one thing and writes a new one.",
)

COMMANDS = (
    train,
    import_model,
    sparse_train,
    prune,
    finetune,
    quantize,
    bn_fuse,
    export_onnx,
    check_onnx,
    pack,
    trt_build,
    trt_eval,
    evaluate,
    compare,
    predict,
    inspect_artifact,
    sensitivity,
    run_recipe,
)
for command in COMMANDS:
    app.command(command.NAME, epilog=f"Example:  {command.EXAMPLE}")(command.run)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print_line(f"micronet {version('micronet')}")
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
    code = run(sys.argv[1:])
    if ranks.world_size() > 1:  # threads of torch's process group that outlive the interpreter would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; no exception that a user can cause passes."""
    try:
        app(modern(arguments), standalone_mode=True)
    except SystemExit as stop:  # Typer has turned Ctrl-C into an exit by now
        if stop.code == INTERRUPTED and ranks.rank() == 0:
            console.print_error("interrupted; every file on disk is whole, and --resume goes on with a training")
        return stop.code if isinstance(stop.code, int) else 1
    except MicronetError as error:
        if not error.told:
            console.print_error(str(error), error.label)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        console.print_error("out of memory; lower --batch-size, --image-size or --limit")
        return 1
    except OSError as error:
        console.print_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 1
    return 0


if __name__ == "__main__":
    main()
