"""The Python API: one function per stage, made from the stage's settings, on artifacts, files or plain modules."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from micronet import registry
from micronet.core.config import Option, alternatives, flatten, options
from micronet.errors import MicronetError
from micronet.stages.execute import execute
from micronet.stages.stage import Memory, Stage, uses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from micronet.artifact.artifact import Artifact

BATCHES = "A data set's name, a folder or a file.npz; or input batches (N, ...), or tuples that begin with one."
_HELP = {
    "data": "A data set's name, a folder or a file.npz.",
    "output": "File to write; without it, nothing is written.",
}


def function(name: str) -> Callable[..., Any]:
    """Return the API's function of a name."""
    stage: Stage = registry.load_object(registry.COMMANDS[registry.API[name]].stage)

    def call(*args: Any, **settings: Any) -> Any:
        bound = signature.bind(*args, **settings)
        return _call(stage, dict(bound.arguments))

    listed = public_options(stage)
    parameters = [*(_parameter(option, stage) for option in listed), *extra_parameters(stage)]
    signature = inspect.Signature(sorted(parameters, key=lambda each: each.kind))
    call.__name__ = call.__qualname__ = name
    call.__module__ = "micronet"
    call.__doc__ = documentation(stage, listed)
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def public_options(stage: Stage) -> list[Option]:
    """Return the settings that the API takes, those given by position first."""
    return [option for option in stage.options if option.about["api"]]


def documentation(stage: Stage, listed: list[Option]) -> str:
    """Return a function's docstring: what it does, and every keyword."""
    helps = {**_HELP, "data": BATCHES} if stage.takes_batches else _HELP
    lines = [stage.summary, "", *([stage.details, ""] if stage.details else []), "Args:"]
    for option in listed:
        help = helps.get(option.name, option.about["help"])
        lines.append(f"    {option.name}: {help}")
    lines += [f"    {each.name}: {_EXTRA_HELP[each.name]}" for each in extra_parameters(stage)] + [""]
    lines += [f"Returns: {stage.product}.", "", "Raises: MicronetError; its message says what to change."]
    return "\n".join(lines)


def save(
    network: "Artifact | nn.Module",
    path: str | Path,
    build: str | None = None,
    args: dict[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write a network as an artifact that every command reads.

    Args:
        network: The network.
        path: The .safetensors file to write.
        build: How to build the float network again: ``pkg.mod:factory``, ``path/to/file.py:factory`` or a built-in
            name. Required for a network that was not built by micronet.
        args: The factory's arguments.
        force: Whether to overwrite the file.

    Raises:
        MicronetError: The file exists, or nothing says how to build the network.
    """
    from micronet.artifact import artifact as artifacts
    from micronet.artifact.history import StageRecord
    from micronet.core.files import check_output_path
    from micronet.models.build import make_spec

    check_output_path(Path(path), force)
    held = _artifact(network)
    if build is not None:
        records = held.history
        if not records or records[0].stage not in ("train", "import"):
            records = [StageRecord("import", {"model": build}), *records]
        held = replace(held, spec=make_spec(build, args), history=records)
        artifacts.check_builds(held)
    if not held.spec.name:
        raise MicronetError('say how to build the network again, for example build="net.py:Net"')
    artifacts.save(held, Path(path))


def load(path: str | Path, model: "str | nn.Module | None" = None, *, trust_code: bool = False) -> "Artifact":
    """Read an artifact; its model is in eval mode.

    Args:
        path: The file.
        model: A freshly built float network to fill, or the name of the user's code again.
        trust_code: Whether the code recorded in the file may run.

    Raises:
        MicronetError: The file is damaged, does not fit, or its code is not trusted.
    """
    from micronet.artifact import artifact as artifacts

    loaded = artifacts.load(Path(path), model, trust_code=trust_code)
    loaded.model.eval()
    return loaded


def _call(stage: Stage, given: dict[str, Any]) -> Any:
    """Run a stage with the API's values and return its product."""
    progress, example = given.pop("progress", None), given.pop("example_input", None)
    known = {option.name: option for option in options(stage.Config)}
    artifacts: dict[Path, Artifact] = {}
    values = {
        name: _value(known[name], value, artifacts if is_network(known[name], stage) else None)
        for name, value in given.items()
        if name != "data"
    }
    batches = None
    if isinstance(given.get("data"), (str, Path)):
        values["data"] = str(given["data"])
    elif given.get("data") is not None:
        if not stage.takes_batches:
            raise MicronetError(f"{stage.name} needs a data set; give data as its name, a folder or a file.npz")
        batches = list(islice(_inputs(given["data"]), given.get("calib_batches")))
    source = artifacts.get(values["artifact"]) if values.get("artifact") is not None else None
    if source is not None and values.get("device") is None and uses(stage.Config, "device"):
        own = next((parameter.device for parameter in source.model.parameters()), None)
        if own is not None and own.type != "cpu":  # a network stays on its device
            values["device"] = str(own)
    from micronet.models.modes import copy_model

    try:
        config = stage.configure(values)
        _check_effect(stage, config, source)
        if source is not None:
            source = replace(source, model=copy_model(source.model))  # training and folding change networks in place
        memory = Memory(source, artifacts, batches, example)
        outcome = execute(stage, config, progress, memory, keep=False)
        stage.judge(config, outcome)
    except MicronetError as error:
        error.args = (re.sub(r"(?<![\w/.-])--([a-z][a-z0-9-]*)", lambda match: match[1].replace("-", "_"), str(error)),)
        raise
    return outcome.product


def _check_effect(stage: Stage, config: Any, source: "Artifact | None") -> None:
    """Raise MicronetError for settings that would have no effect when they are called from Python."""
    values = flatten(config)
    output, resume = values.get("output"), values.get("resume")
    if output is None and (resume or values.get("max_time") is not None):
        raise MicronetError("--resume and --max-time need --output: the checkpoint lies beside it")
    if source is not None and not source.spec.name and output is not None and stage.writes(config) == ".safetensors":
        raise MicronetError("nothing says how to build this network again; leave --output out and use micronet.save")
    if (stage.processes(config) or 1) > 1:
        raise MicronetError("several GPUs need several processes; start your script with torchrun")


def _value(option: Option, value: Any, artifacts: "dict[Path, Artifact] | None") -> Any:
    """Return a setting's value: networks in memory by a path that stands for them, text as paths if it names files."""
    kinds = alternatives(option.field.type)
    if list[Path] in kinds:
        items = [value] if isinstance(value, (str, Path)) or not isinstance(value, Iterable) else list(value)
        return [_path(option, item, artifacts) for item in items]
    return _path(option, value, artifacts) if Path in kinds and value is not None else value


def _path(option: Option, value: Any, artifacts: "dict[Path, Artifact] | None") -> Path:
    if isinstance(value, (str, Path)):
        return Path(value)
    if artifacts is None:
        raise MicronetError(f"{option.name} is a {type(value).__name__}; expected a path")
    held = _artifact(value)
    path = Path(f"<{type(held.model).__name__} {len(artifacts) + 1}>.safetensors")  # a key, never a file
    artifacts[path] = held
    return path


def _artifact(network: Any) -> "Artifact":
    """Return an artifact; a plain module becomes one that does not know how it was built."""
    from torch import nn

    from micronet.artifact.artifact import Artifact
    from micronet.models.build import ModelSpec

    if isinstance(network, Artifact):
        return network
    if isinstance(network, nn.Module):
        return Artifact(network, ModelSpec("", {}), [])
    raise MicronetError(f"expected a path, an Artifact or a torch.nn.Module, got {type(network).__name__}")


def _inputs(data: Any) -> "Iterator[Tensor]":
    """Yield input tensors from a tensor or an iterable of batches, each a tensor or a tuple that begins with one."""
    from torch import Tensor

    for batch in [data] if isinstance(data, Tensor) else data:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(first, Tensor):
            raise MicronetError(
                f"a batch of data is a tensor or a tuple that begins with one, not a {type(first).__name__}"
            )
        yield first


def _parameter(option: Option, stage: Stage) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.about["argument"] else inspect.Parameter.KEYWORD_ONLY
    default = inspect.Parameter.empty if option.required else option.default
    return inspect.Parameter(option.name, kind, default=default, annotation=annotation(option, stage))


def extra_parameters(stage: Stage) -> list[inspect.Parameter]:
    """Return the parameters that only the API has."""
    progress = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Progress | None")
    kind, of = inspect.Parameter.POSITIONAL_OR_KEYWORD, "Tensor | tuple[Tensor, ...] | None"
    example = inspect.Parameter("example_input", kind, default=None, annotation=of)
    return [example, progress] if stage.takes_example else [progress]


_EXTRA_HELP = {
    "example_input": "An input batch, or a tuple of them; needed if no data set describes the network's input.",
    "progress": "An object with ``step`` and ``line`` that receives progress.",
}
_TYPES: Mapping[Any, str] = {Path: "str | Path", list[Path]: "Sequence[str | Path]", NoneType: "None"}


def is_network(option: Option, stage: Stage) -> bool:
    """Return True if a setting takes networks in memory too: one that names artifacts."""
    return stage.takes_networks and ".safetensors" in option.about["kinds"]


def annotation(option: Option, stage: Stage) -> str:
    """Return a keyword's type as text: paths may be text, networks may be in memory."""
    network = "Artifact | nn.Module | " if is_network(option, stage) else ""
    if option.name == "data" and stage.takes_batches:
        return "str | Path | Tensor | Iterable[Tensor | Sequence[Tensor]] | None"
    if option.name == "data":
        return "str | Path | None"
    if network and list[Path] in alternatives(option.field.type):
        return f"Sequence[{network}str | Path]"
    kinds = alternatives(option.field.type)
    names = [_TYPES.get(kind) or inspect.formatannotation(kind).replace("typing.", "") for kind in kinds]
    return network + " | ".join(names)
