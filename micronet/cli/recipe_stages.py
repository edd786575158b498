"""A recipe's stages bound to the commands they name: checked as the command line checks, then called from here."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from micronet.cli.options import is_argument, spell
from micronet.errors import MicronetError, unknown
from micronet.recipe import Recipe, Stage

RUNS_OVER = ("force", "resume", "quiet", "json", "dry_run")  # how a stage runs, not what it computes
_SUFFIX = {"export-onnx": ".onnx"}


@dataclass(frozen=True)
class BoundStage:
    """A stage with the function that runs it, all its options, its output file and the files it reads."""

    stage: Stage
    module: ModuleType
    options: dict[str, Any]
    output: Path | None
    inputs: list[Path]

    @property
    def can_resume(self) -> bool:
        """Whether the command trains, so that it can go on after it was killed."""
        return "resume" in _parameters(self.module)

    def line(self) -> str:
        """Return the command line that does the same."""
        return shlex.join(["micronet", *self._arguments()])

    def run(self, **how: Any) -> None:
        """Call the command. Raises what the command raises."""
        parameters = _parameters(self.module)
        defaults = {name: item.default for name, item in parameters.items()}
        with _as_command_line(self._arguments()):
            self.module.run(**{**defaults, **self.options, **{key: how[key] for key in how if key in parameters}})

    def _arguments(self) -> list[str]:
        return spell(self.stage.command, self.module.run, self.options)


def bind(recipe: Recipe, commands: Mapping[str, ModuleType], data: str | None = None) -> list[BoundStage]:
    """Check every stage of a recipe before any of them runs; ``data`` go to the first stage that takes data.

    A recipe that does not end in ``compare`` gets one over all files it makes. Raises MicronetError with the line.
    """
    bound: list[BoundStage] = []
    stages = list(recipe.stages)
    if stages[-1].command != "compare":
        stages.append(Stage("compare", "compare", {}, stages[-1].line, {}))
    for stage in stages:
        if stage.command not in commands:
            line = stage.lines.get("command", stage.line)
            raise recipe.error(line, str(unknown("command", stage.command, commands)))
        module = commands[stage.command]
        reads = "data" in _parameters(module) and not getattr(module, "DATA_ARE_OPTIONAL", False)
        if data is not None and reads:
            stage, data = replace(stage, options={**stage.options, "data": data}), None
        bound.append(_bind(recipe, stage, module, bound))
    return bound


def _bind(recipe: Recipe, stage: Stage, module: ModuleType, earlier: list[BoundStage]) -> BoundStage:
    parameters = _parameters(module)
    for name, value in stage.options.items():
        line = stage.lines.get(name, stage.line)
        if name not in parameters or name in RUNS_OVER:
            known = [key for key in parameters if key not in RUNS_OVER]
            raise recipe.error(line, str(unknown(f"option of {stage.command}:", name, known)))
        if not _accepts(parameters[name].annotation, value):
            raise recipe.error(line, f"{name} is {value!r}; expected {_describe(parameters[name].annotation)}")
    made = {bound.stage.name: bound.output for bound in earlier if bound.output is not None}
    options = {name: _resolved(parameters[name].annotation, value, made) for name, value in stage.options.items()}
    options = {**_default_input(recipe, stage, parameters, options, earlier), **options}
    inputs = [path for name, value in options.items() if name != "output" for path in _paths(value)]
    for path in inputs:
        if path not in made.values() and not path.exists():
            raise recipe.error(stage.line, str(unknown("stage or file", str(path), made)))
    output = None
    if "output" in parameters:
        suffix = _SUFFIX.get(stage.command, ".safetensors")
        output = recipe.folder / (stage.options.get("output") or f"{stage.name}{suffix}")
        _check_output(recipe, stage, output, [*made.values(), *inputs])
        options["output"] = output
    try:
        module.run.check(options)
    except MicronetError as error:
        raise recipe.error(stage.line, f"{stage.command}: {error}") from error
    return BoundStage(stage, module, options, output, [*inputs, *_files_named(stage.options)])


def _check_output(recipe: Recipe, stage: Stage, output: Path, taken: list[Path]) -> None:
    """Raise MicronetError where a stage would write over what it or another stage reads or writes, or cannot write."""
    line = stage.lines.get("output", stage.line)
    if output.resolve() in [path.resolve() for path in taken]:
        raise recipe.error(line, f"{output} is another stage's file or this stage's input; write to another")
    if output.parent != recipe.folder and not output.parent.is_dir():
        raise recipe.error(line, f"{output.parent} is no folder; create it first (mkdir -p {output.parent})")


def _files_named(options: Mapping[str, Any]) -> list[Path]:
    """Return the files that text options name: ``data = "x.npz"``, ``model = "net.py:Net"``."""
    texts = [value for value in options.values() if isinstance(value, str)]
    named = [Path(part) for text in texts for part in (text, text.rpartition(":")[0]) if part]
    return [path for path in named if path.is_file()]


def _default_input(
    recipe: Recipe,
    stage: Stage,
    parameters: Mapping[str, Parameter],
    options: Mapping[str, Any],
    earlier: list[BoundStage],
) -> dict[str, Any]:
    """Return the input a stage has when it names none: the artifact made last, for compare all files made."""
    name = next((name for name, item in parameters.items() if is_argument(item)), None)
    if name is None or name in options:
        return {}
    made = [bound.output for bound in earlier if bound.output is not None]
    if name == "files":
        found: list[Path] | Path | None = made or None
    else:
        found = next((path for path in reversed(made) if path.suffix == ".safetensors"), None)
    if found is None and parameters[name].default is Parameter.empty:
        raise recipe.error(stage.line, f"{stage.command} needs {name}, and no stage before it makes one")
    return {} if found is None else {name: found}


def _parameters(module: ModuleType) -> Mapping[str, Parameter]:
    return signature(module.run).parameters


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _accepts(annotation: Any, value: Any) -> bool:
    """Tell whether a TOML value can be what an option's type says."""
    kind = _bare(annotation)
    if isinstance(kind, UnionType):
        return any(_accepts(item, value) for item in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_accepts(get_args(kind)[0], item) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, (str, int)) and not isinstance(value, bool)  # w_bits = 8, w_bits = "binary"
    return isinstance(value, str if kind is Path else kind)


def _describe(annotation: Any) -> str:
    kind = _bare(annotation)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of files or stage names"
    kinds = [item for item in get_args(kind) if item is not type(None)] if isinstance(kind, UnionType) else [kind]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a file"}
    return " or ".join(names.get(item, str(item)) for item in kinds)


def _resolved(annotation: Any, value: Any, made: Mapping[str, Path]) -> Any:
    """Turn a file option's text into a path: of the stage of that name, where there is one."""
    kind = _bare(annotation)
    if isinstance(value, list):
        return [_resolved(get_args(kind)[0], item, made) for item in value]
    if kind is str:
        return str(value)
    takes_path = kind is Path or (isinstance(kind, UnionType) and Path in get_args(kind))
    return made.get(value, Path(value)) if takes_path else value


def _paths(value: Any) -> list[Path]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Path)]


@contextmanager
def _as_command_line(arguments: list[str]) -> Iterator[None]:
    """Let an artifact's header record the stage's own command line."""
    typed = sys.argv
    sys.argv = ["micronet", *arguments]
    try:
        yield
    finally:
        sys.argv = typed
