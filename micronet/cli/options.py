"""Options that commands share. A config dataclass becomes one flag a field, so no flag is declared twice.

A command takes configs as parameters (``training: TrainConfig = TrainConfig(epochs=2)``); ``with_configs`` shows Typer
the fields instead, with the default instance's values as defaults, and hands the command whole configs.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from typer.models import ArgumentInfo

from micronet import registry
from micronet.artifact.kinds import check_file_kind
from micronet.cli.launch import carry_out
from micronet.core.config import check_range, flag, setting
from micronet.errors import MicronetError


def of_kind(*taken: str) -> Callable[[Path | None], Path | None]:
    """Make a callback that refuses an argument of another kind, before a command asks about its output."""

    def check(path: Path | None) -> Path | None:
        if path is not None:
            check_file_kind(path, *taken)
        return path

    return check


Input = Annotated[
    Path,
    typer.Argument(
        metavar="ARTIFACT",
        help="An artifact (.safetensors).",
        show_default=False,
        callback=of_kind(".safetensors"),
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which network."""

    model: str | None = setting(
        None,
        "A network of ours, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory, whose code then runs; "
        "default: nin.",
    )
    width: float | None = setting(None, "Multiplies every layer's channels (our networks only); default 1.")
    model_args: str | None = setting(None, "The factory's arguments as JSON, for example '{\"num_classes\": 10}'.")

    def __post_init__(self) -> None:
        if self.width is not None:
            check_range(self, "width", 0.01, 16)
        parse_json_object(self.model_args, "model_args")

    @property
    def name(self) -> str:
        """The network named, or the default one."""
        return self.model or "nin"

    @property
    def file(self) -> Path:
        """The artifact's default path."""
        return Path(f"{self.name.rpartition(':')[2]}.safetensors")

    def check_unused(self) -> None:
        """Raise MicronetError where a new network is described although an artifact is given."""
        if self.width is not None or self.model_args is not None:
            raise MicronetError("--width and --model-args make a new network; leave them out when an artifact is given")


@dataclass(frozen=True)
class DataOptions:
    """Which images."""

    data: str | None = setting(
        None,
        "digits, cifar10, cifar100, mnist, fashion-mnist, a folder with train/ and test/, a file.npz, or "
        "pkg.mod:factory; default: what the artifact was made with; from nothing, digits.",
    )
    image_size: int | None = setting(None, "Pixels a side; images are resized and cropped to it.")
    limit: int | None = setting(None, "Use only so many training and test images, for a quick trial.")


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes."""

    output: Path | None = setting(None, "File to write; default: a name beside the input, which is printed.", "-o")
    force: bool = setting(False, "Overwrite the output.")
    json: bool = setting(False, "Print the result as JSON.")
    quiet: bool = setting(False, "Print errors only.", "-q")


@dataclass(frozen=True)
class ReportOptions:
    """How the result is shown."""

    json: bool = setting(False, "Print the result as JSON.")
    quiet: bool = setting(False, "Show no progress.", "-q")


@dataclass(frozen=True)
class RunConfig:
    """How it runs."""

    seed: int = setting(1, "Seed of weights, order, augmentation and validation split.")
    device: str | None = setting(None, "cpu, cuda or cuda:N; default: the best present.")
    resume: bool = setting(False, "Go on with a training that was interrupted.")
    max_time: float | None = setting(
        None, "Minutes after which training stops at a checkpoint, with exit code 3; --resume goes on."
    )
    checkpoint_minutes: float = setting(10.0, "Write a checkpoint so often within an epoch too; 0: at every step.")
    compile: bool = setting(False, "Compile the training step with torch.compile (untried on a GPU).")

    def __post_init__(self) -> None:
        check_range(self, "seed", 0, 2**31)
        check_range(self, "checkpoint_minutes", 0)
        if self.max_time is not None:
            check_range(self, "max_time", 0)


@dataclass(frozen=True)
class SpreadConfig(RunConfig):
    """How it runs, perhaps in several processes."""

    device: str | None = setting(
        None, "cpu, cuda, cuda:N, or 0,1 for a process on each of these GPUs (untried); default: the best present."
    )
    processes: int | None = setting(None, "Train in so many processes of this machine, each with its part of a batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes is not None:
            check_range(self, "processes", 1, 1024)
        if self.gpus and not all(gpu.isdigit() for gpu in self.gpus):
            raise MicronetError(f"--device is {self.device!r}; allowed: numbers of GPUs, for example 0,1")
        if len(set(map(int, self.gpus))) < len(self.gpus):
            raise MicronetError(f"--device {self.device} names a GPU twice; name one for each process")
        if self.gpus and self.processes not in (None, len(self.gpus)):
            raise MicronetError(f"--device {self.device} is {len(self.gpus)} processes; leave --processes out")

    @property
    def gpus(self) -> list[str]:
        """The numbers of the GPUs named, one a process."""
        return self.device.split(",") if self.device is not None and self.device[:1].isdigit() else []

    @property
    def wanted(self) -> int:
        """How many processes are asked for."""
        return self.processes or max(1, len(self.gpus))


def with_configs(command: Callable[..., None]) -> Callable[..., None]:
    """Expand a command's config parameters into options; other parameters stay as they are."""
    shown: list[inspect.Parameter] = []
    configs: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(parameter.annotation):
            shown.append(parameter)
            continue
        config: Any = parameter.annotation
        default = parameter.default if parameter.default is not parameter.empty else config()
        panel = (config.__doc__ or "").splitlines()[0].rstrip(".")
        configs[name] = (config, [item.name for item in fields(config)])
        shown.extend(_option(item, getattr(default, item.name), panel) for item in fields(config))

    def build_configs(values: dict[str, Any]) -> dict[str, Any]:
        """Build every config from the values there are. Raises MicronetError where one is out of its range."""
        return {
            name: build(**{key: values[key] for key in keys if key in values})
            for name, (build, keys) in configs.items()
        }

    @functools.wraps(command)
    def run(**values: Any) -> None:
        built = build_configs(values)
        taken = {key for _, keys in configs.values() for key in keys}
        own = {key: value for key, value in values.items() if key not in taken}
        processes = next((config.wanted for config in built.values() if isinstance(config, SpreadConfig)), None)
        carry_out(functools.partial(command, **own, **built), processes, lambda: command_line(values))

    def command_line(values: dict[str, Any]) -> list[str]:
        name = next(name for name, each in registry.COMMANDS.items() if each.module == command.__module__)
        defaults = {parameter.name: parameter.default for parameter in shown}
        return spell(name, run, {key: value for key, value in values.items() if value != defaults[key]})

    run.check = build_configs  # type: ignore[attr-defined]  # for those who have values but want nothing run yet
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def spell(name: str, command: Callable[..., None], values: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line that calls a command with these values."""
    words: list[str] = [name]
    parameters = inspect.signature(command).parameters
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if is_argument(parameters[key]):
            words += map(str, items)
        elif value is True:
            words.append(flag(key))
        elif value is not False and value is not None:
            words += [flag(key), str(value)]
    return words


def is_argument(parameter: inspect.Parameter) -> bool:
    """Tell whether a command's parameter is positional on the command line."""
    if get_origin(parameter.annotation) is not Annotated:
        return False
    return any(isinstance(item, ArgumentInfo) for item in parameter.annotation.__metadata__)


def default_name(beside: Path, ending: str) -> Path:
    """Return an output's name beside an input: ``a/b.onnx`` and ``-fused.safetensors`` give ``a/b-fused…``."""
    return beside.with_name(beside.stem + ending)


def parse_json_object(text: str | None, name: str) -> dict[str, Any]:
    """Parse an option that holds a JSON object. Raises MicronetError where it does not."""
    import json

    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise MicronetError(f"{flag(name)} is no JSON: {error}; for example '{{\"num_classes\": 10}}'") from error
    if not isinstance(value, dict):
        raise MicronetError(f"{flag(name)} is a JSON {type(value).__name__}; expected an object")
    return value


def _option(item: Any, default: Any, panel: str) -> inspect.Parameter:
    names = [flag(item.name), *filter(None, [item.metadata.get("short")])]
    option = typer.Option(*names, help=item.metadata["help"], rich_help_panel=panel)
    kind, default = (str, str(default)) if item.type == int | str else (item.type, default)  # Typer has no unions
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
