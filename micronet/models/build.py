"""Building a network by its name, and recording the name so that it can be built again.

Names: a built-in model, ``torchvision:resnet18``, ``pkg.mod:factory`` or ``path/to/file.py:factory``. The last two run
the user's code, so building them from an artifact needs permission (``trusted``). A file's text and SHA-256 are
recorded with its name: the artifact loads without the file, and a changed file is noticed.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from micronet import registry
from micronet.core.machine import available_memory
from micronet.errors import MicronetError, explain_code_error, unknown
from micronet.models.modes import check_modes
from micronet.models.spec import TORCHVISION as TORCHVISION
from micronet.models.spec import ModelSpec as ModelSpec

# Torch's advice to who wrote the network. Every command builds it again, and none of it concerns the command.
REPEATED = ("enable_nested_tensor is True", "`torch.nn.utils.weight_norm` is deprecated")
_USER_MODULE = "micronet_user:"  # what the modules' names of users' files begin with
_FORMS = ("torchvision:NAME", "pkg.mod:factory", "path/to/file.py:factory")


def make_spec(name: str, args: dict[str, Any] | None = None, option: str = "--model") -> ModelSpec:
    """Return the spec of a named network; a user's file is read but not run. ``option``: what errors call it by."""
    file, _ = _split(name)
    if file is None:
        return ModelSpec(name, args or {})
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MicronetError(f"{option} {name}: {file} cannot be read ({error})") from error
    return ModelSpec(name, args or {}, source, _sha256(source))


def check_same_code(named: ModelSpec, recorded: ModelSpec) -> None:
    """Raise MicronetError if the named code differs from the code recorded in the artifact."""
    if recorded.sha256 != named.sha256 or (recorded.sha256 is None and recorded.name != named.name):
        raise MicronetError(
            f"--model {named.name} is not the code that created this artifact ({recorded.name}, sha256 "
            f"{(recorded.sha256 or 'none')[:12]}); pass the original code, use --trust-code to run the recorded copy, "
            "or, if the change is meant, make the artifact again"
        )


def build_model(spec: ModelSpec, *, trusted: bool = False, most_bytes: int | None = None) -> nn.Module:
    """Build a network with its initial weights.

    Args:
        trusted: Whether user code may run.
        most_bytes: Limit on the bytes of its tensors, for networks that are not user code; None: the free memory.

    Raises:
        MicronetError: The name is unknown, the factory failed, user code is not trusted, or the network is too large.
    """
    if spec.runs_user_code and not trusted:
        raise MicronetError(
            f"this artifact's network is built by custom code, {spec.name}, which is not run automatically; add "
            f"--model {spec.name} to run your own copy, or --trust-code if you trust the author of the artifact"
        )
    factory = _factory(spec)
    fixed = factory.keywords if isinstance(factory, partial) else {}
    if refused := [name for name, value in spec.args.items() if name in fixed and value != fixed[name]]:
        raise MicronetError(f"model {spec.name} does not accept {min(refused)}; drop it from --model-args")
    try:
        with warnings.catch_warnings():
            for message in REPEATED:
                warnings.filterwarnings("ignore", message)
            if spec.name in registry.MODELS:  # a network of ours without channels
                warnings.filterwarnings("error", "Initializing zero-element tensors")
            if not spec.runs_user_code:
                _check_size(factory, spec, most_bytes)
            model = factory(**spec.args)
    except MicronetError:
        raise
    except Exception as error:
        raise MicronetError(
            f"model {spec.name} could not be built with arguments {spec.args} ({type(error).__name__}: {error}); "
            "check --model-args"
        ) from error
    if not isinstance(model, nn.Module):
        raise MicronetError(f"model {spec.name} returned {type(model).__name__}; expected a torch.nn.Module")
    check_sizes_known(model, f"model {spec.name}")
    check_modes(model)
    return model


def check_sizes_known(model: nn.Module, name: str) -> None:
    """Raise MicronetError, which calls the network ``name``, if it has lazy layers that did not run yet."""
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise MicronetError(
            f"{name} has lazy layers, whose sizes are not known yet; run the network once on an example where it is "
            "built"
        )


def _check_size(factory: Callable[..., nn.Module], spec: ModelSpec, most_bytes: int | None) -> None:
    """Raise MicronetError if a network's tensors would take more memory than there is, or than ``most_bytes``."""
    try:
        with torch.device("meta"):  # tensors without memory
            shell = factory(**spec.args)
    except Exception:  # it reads values of tensors, or the real one says what is wrong
        return
    size = sum(tensor.nbytes for tensor in (*shell.parameters(), *shell.buffers()))
    free = available_memory()
    takes = f"model {spec.name} with arguments {spec.args} takes {size >> 20:,} MiB of memory"
    if most_bytes is not None and size > most_bytes:
        raise MicronetError(f"{takes}, for which its file is too small; the file is damaged, so copy or make it again")
    if size > free:
        raise MicronetError(f"{takes}, but {free >> 20:,} MiB are free; check --model-args")


def user_object(name: str, option: str) -> Callable[..., Any]:
    """Return a function or class of the user's, ``path/to/file.py:Name`` or ``pkg.mod:Name``, whose code runs now.

    ``option``: the one that it was named by. Raises MicronetError if that fails.
    """
    return _user_factory(make_spec(name, option=option), option.removeprefix("--"))


def accepted_args(spec: ModelSpec, offers: dict[str, Any]) -> dict[str, Any]:
    """Return the offered arguments that a built-in model's factory takes; nothing for other models."""
    if spec.name not in registry.MODELS:
        return {}
    parameters = signature(_factory(spec)).parameters
    return {name: value for name, value in offers.items() if name in parameters}


def _factory(spec: ModelSpec) -> Callable[..., Any]:
    if spec.name.startswith(TORCHVISION):
        from torchvision.models import get_model, get_model_builder, list_models

        name = spec.name.removeprefix(TORCHVISION)
        if not is_torchvision(name):
            raise unknown("torchvision model", name, list_models())
        builder = signature(get_model_builder(name)).parameters
        untrained = [each for each in ("weights", "weights_backbone") if each in builder]  # they would be downloaded
        return partial(get_model, name, **dict.fromkeys(untrained))
    if ":" in spec.name:
        return _user_factory(spec)
    check_name(spec.name)
    factory: Callable[..., Any] = registry.load_object(registry.MODELS[spec.name])
    return factory


def check_name(name: str) -> None:
    """Raise MicronetError unless a name is a built-in model's, or says where another one comes from."""
    if name in registry.MODELS or ":" in name:
        return
    if is_torchvision(name):
        raise MicronetError(f"{name} is a torchvision network; use --model {TORCHVISION}{name}")
    raise unknown("model", name, [*registry.MODELS, *_FORMS])


def is_torchvision(name: str) -> bool:
    """Return True if torchvision has a network of a name."""
    from torchvision.models import list_models

    return name in list_models()


def _user_factory(spec: ModelSpec, noun: str = "model") -> Callable[..., Any]:
    file, attribute = _split(spec.name)
    folder = Path.cwd() if file is None else file.parent
    try:
        with registry.importable_from(folder):
            module = import_module(spec.name.partition(":")[0]) if file is None else _module_of(spec, file)
    except Exception as error:
        if file is not None and str(getattr(error, "name", "")).startswith(_USER_MODULE):
            raise MicronetError(f"{file} uses relative imports; {_name_as_module(file, attribute, noun)}") from error
        raise MicronetError(f"importing the code of {noun} {spec.name} failed {explain_code_error(error)}") from error
    try:
        factory: Callable[..., Any] = getattr(module, attribute)
    except AttributeError:
        if noun == "model" and hasattr(module, "create_model"):
            package = spec.name.rpartition(":")[0]
            raise MicronetError(
                f"{package} builds networks by name; for {attribute}, use --model {package}:create_model "
                f"""--model-args '{{"model_name": "{attribute}", "pretrained": true}}'"""
            ) from None
        kind = "factory" if noun == "model" else "class"
        public = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
        own = [name for name, value in public.items() if _is_from(value, module)]
        if kind == "class":
            own = [name for name in own if isinstance(public[name], type)]
        raise unknown(f"{kind} in {spec.name.rpartition(':')[0]}:", attribute, own or public) from None

    def call(**args: Any) -> Any:
        with registry.importable_from(folder):  # the factory may import its neighbours, too
            return factory(**args)

    return call


def _name_as_module(file: Path, attribute: str, noun: str) -> str:
    """Return what to type so that a file is imported as a module of its package."""
    folder = file.resolve().parent
    names = [folder.name, *([] if file.stem == "__init__" else [file.stem])]
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
        names.insert(0, folder.name)
    root = os.path.relpath(folder.parent)
    path = "" if root == os.curdir else f" with PYTHONPATH={root}"
    return f"name it as a module of its package: --{noun} {'.'.join(names)}:{attribute}{path}"


def _is_from(value: Any, module: ModuleType) -> bool:
    """Return True if an object is defined in a module, or in one of the modules of a package."""
    home = str(getattr(value, "__module__", ""))
    return home == module.__name__ or home.startswith(f"{module.__name__}.")


def _split(name: str) -> tuple[Path | None, str]:
    """Split ``path/file.py:factory`` into path and factory; the path is None for ``pkg.mod:factory``."""
    module, _, attribute = name.rpartition(":")
    return (Path(module) if module.endswith(".py") else None), attribute


def _module_of(spec: ModelSpec, file: Path) -> ModuleType:
    """Return a user's file as a module: the script that is running now, if it is that, otherwise run its text."""
    running = sys.modules["__main__"]
    script = Path(getattr(running, "__file__", None) or "")
    if script.is_file() and _sha256(script.read_text(encoding="utf-8", errors="replace")) == spec.sha256:
        return running
    title = f"{file.name}:{(spec.sha256 or '')[:8]}"
    module = ModuleType(f"{_USER_MODULE}{title}")
    sys.modules[module.__name__] = module  # dataclasses and typing look up a class's module there
    same = file.is_file() and _sha256(file.read_text(encoding="utf-8", errors="replace")) == spec.sha256
    if same:  # otherwise the folder is another one, whose files the text must not find
        module.__file__ = str(file.resolve())
    exec(compile(spec.source or "", str(file) if same else title, "exec"), module.__dict__)  # for tracebacks
    return module


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
