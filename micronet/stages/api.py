"""The Python API: one function per stage, made from the stage's settings, on artifacts, files or plain modules."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import TYPE_CHECKING, Any

from micronet import registry
from micronet.core.config import Option, alternatives, flatten
from micronet.errors import MicronetError
from micronet.stages.documentation import WIDTH, documentation
from micronet.stages.execute import execute
from micronet.stages.keywords import offer_example, spell_as_keywords
from micronet.stages.stage import Memory, Stage, uses

if TYPE_CHECKING:
    from torch import nn

    from micronet.artifact.artifact import Artifact

_TYPES: dict[Any, str] = {Path: "str | Path", list[Path]: "Sequence[str | Path]", NoneType: "None"}
# Text settings that hold several values, separated by commas: from Python, a list serves too.
_LISTS = ("include", "exclude", "keep_8bit", "widths", "dynamic", "mean", "std", "batch_sizes", "sizes")
_OBJECTS = ("model_args",)  # text settings that hold JSON: a dict serves too
_POSITIONAL, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def function(name: str) -> Callable[..., Any]:
    """Return the API's function of a name."""
    stage: type[Stage] = registry.load_object(registry.COMMANDS[registry.API[name]].stage)
    signature = _Signature(_parameters(stage), return_annotation=_Type(stage.product))

    def call(*args: Any, **settings: Any) -> Any:
        return _call(stage, dict(signature.bind(*args, **settings).arguments))

    call.__name__ = call.__qualname__ = name
    call.__module__ = "micronet"
    call.__doc__ = documentation(stage, list(signature.parameters))
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _parameters(stage: type[Stage]) -> list[inspect.Parameter]:
    """Return a function's parameters: the stage's settings, and what only the API takes."""
    found = []
    for option in stage.options():
        if option.about["api"]:
            default = inspect.Parameter.empty if option.required else option.default
            kind = _POSITIONAL if option.about["argument"] else _KEYWORD
            found.append(
                inspect.Parameter(option.name, kind, default=default, annotation=_Type(_annotation(option, stage)))
            )
    if stage.takes_example:
        kinds = "Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None"
        found.append(inspect.Parameter("example_input", _POSITIONAL, default=None, annotation=_Type(kinds)))
    found.append(inspect.Parameter("progress", _KEYWORD, default=None, annotation=_Type("Progress | None")))
    return sorted(found, key=lambda each: each.kind)


def _annotation(option: Option, stage: type[Stage]) -> str:
    """Return a keyword's type as text: paths may be text, networks may be in memory."""
    if option.name == "data":
        return "str | Path | Batch | Iterable[Batch] | None"
    if option.name == "model" and stage.takes_module:
        return "str | Artifact | nn.Module | None"
    kinds = alternatives(option.field.type)
    network = "Artifact | nn.Module | " if _is_network(option, stage) else ""
    if network and list[Path] in kinds:
        return f"Sequence[{network}str | Path]"
    names = [_TYPES.get(kind) or inspect.formatannotation(kind).replace("typing.", "") for kind in kinds]
    several = "Sequence[str | float] | " if option.name in _LISTS else ""
    several += "Mapping[str, object] | " if option.name in _OBJECTS else ""
    return network + several + " | ".join(names)


def _is_network(option: Option, stage: type[Stage]) -> bool:
    """Return True if a setting takes networks in memory too: one that names artifacts."""
    return stage.takes_networks and ".safetensors" in option.about["kinds"]


class _Type(str):
    """A type's name that signatures show without quotes."""

    __repr__ = str.__str__


class _Signature(inspect.Signature):
    """A signature that ``help`` shows in lines."""

    def __str__(self) -> str:
        """Return the signature, wrapped between parameters."""
        text, space = super().__str__(), "\N{NO-BREAK SPACE}"
        for each in map(str, self.parameters.values()):
            text = text.replace(each, each.replace(" ", space))
        return fill(text, WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False).replace(space, " ")


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
    from micronet.artifact.header import StageRecord
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
        raise MicronetError('this network cannot be rebuilt from a file; pass build, for example build="net.py:Net"')
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


def _call(stage: type[Stage], given: dict[str, Any]) -> Any:
    """Run a stage with the API's values and return its product."""
    progress, example, data = (given.pop(name, None) for name in ("progress", "example_input", "data"))
    if example is not None and not isinstance(example, (tuple, list, Mapping)) and not hasattr(example, "shape"):
        raise MicronetError(
            f"example_input is a {type(example).__name__}; expected a tensor, or a tuple or dict of tensors"
        )
    known = {option.name: option for option in stage.options()}
    artifacts: dict[Path, Artifact] = {}
    values = {name: _value(stage, known[name], value, artifacts) for name, value in given.items()}
    if isinstance(data, (str, Path)):
        values["data"] = str(data)
    elif data is not None:
        from micronet.data.memory import MemoryData

        values["data"] = MemoryData(data)
    source = artifacts.get(values.get("artifact", Path()))
    if stage.takes_module and not isinstance(values.get("model"), (str, NoneType)):
        source = _artifact(values.pop("model"))
    if source is not None and values.get("device") is None and uses(stage, "device"):
        own = next((parameter.device for parameter in source.model.parameters()), None)
        if own is not None and own.type != "cpu":  # a network stays on its device
            values["device"] = str(own)
    from micronet.models.modes import copy_model

    takes_example = stage.takes_example and values.get("target") != "packed"  # which is checked on data alone
    with spell_as_keywords(stage), offer_example(offered=takes_example and example is None):
        configured = stage.configure(values)
        _check_effect(configured, source)
        if source is not None:
            source = replace(source, model=copy_model(source.model))  # training and folding change networks in place
        memory = Memory(source, artifacts, example)
        outcome = execute(configured, progress, memory, keep=False)
        configured.judge(outcome)
    return outcome.product


def _check_effect(stage: Stage, source: "Artifact | None") -> None:
    """Raise MicronetError for settings that would have no effect when they are called from Python."""
    values = flatten(stage)
    output, resume = values.get("output"), values.get("resume")
    if output is None and (resume or values.get("max_time") is not None):
        raise MicronetError(
            "--resume and --max-time need --output, because the checkpoint is stored next to it; add --output"
        )
    if source is not None and not source.spec.name and output is not None and stage.writes() == ".safetensors":
        raise MicronetError(
            "this network cannot be rebuilt from a file; drop --output and call micronet.save with build"
        )
    if (stage.processes() or 1) > 1:
        raise MicronetError("training on multiple GPUs requires one process per GPU; start your script with torchrun")


def _value(stage: type[Stage], option: Option, value: Any, artifacts: "dict[Path, Artifact]") -> Any:
    """Return a setting's value: networks in memory by a path that stands for them, text as paths if it names files."""
    kinds = alternatives(option.field.type)
    if option.name in _LISTS and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if option.name in _OBJECTS and isinstance(value, Mapping):
        try:
            return json.dumps(dict(value))
        except TypeError as error:
            raise MicronetError(f"{option.name} can only hold JSON values ({error})") from error
    if value is None or not {Path, list[Path]} & set(kinds):
        return value
    held = artifacts if _is_network(option, stage) else None
    if Path in kinds:
        return _path(option, value, held)
    items = [value] if isinstance(value, (str, Path)) or not isinstance(value, Iterable) else value
    return [_path(option, item, held) for item in items]


def _path(option: Option, value: Any, artifacts: "dict[Path, Artifact] | None") -> Path:
    if isinstance(value, (str, Path)):
        return Path(value)
    if artifacts is None:
        raise MicronetError(f"{option.name} must be a path; got {type(value).__name__}")
    held = _artifact(value)
    stages = f" ({', '.join(record.stage for record in held.history)})" if held.history else ""
    name = f"{held.spec.name.rpartition(':')[2] or held.spec.args.get('class', 'network')}{stages}"
    names = [name, *(f"{name} {number}" for number in range(2, len(artifacts) + 2))]
    path = next(key for each in names if (key := Path(f"<{each}>.safetensors")) not in artifacts)  # never a file
    artifacts[path] = held
    return path


def _artifact(network: Any) -> "Artifact":
    """Return an artifact; a plain module becomes one that does not know how it was built."""
    from torch import nn

    from micronet.artifact.artifact import Artifact
    from micronet.models.build import ModelSpec, check_sizes_known

    if isinstance(network, Artifact):
        return network
    if isinstance(network, nn.Module):
        check_sizes_known(network, "the network")
        return Artifact(network, ModelSpec("", {"class": type(network).__name__}), [])
    raise MicronetError(f"expected a path, an Artifact or a torch.nn.Module, got {type(network).__name__}")
