"""Networks that take their tensors by name or in a dict, called by the tensors' order like any other network.

Commands, runtimes and traces pass a network's inputs by their order. A network whose forward takes keywords or a dict
gets a class of its own, derived from the user's, whose forward takes tensors in a fixed order and passes them on by
their names. It stays the same object: its layers, tensors, hooks and methods keep their names, and calls by keyword
work as before.
"""

import inspect
import keyword
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, get_origin

import torch
from torch import Tensor, fx, nn

from micronet.errors import first_line
from micronet.models.outputs import tensors_in

_ORIGINAL, _NAMES = "_original_class", "_input_names"
_Call = Callable[[nn.Module, tuple[Any, ...]], Any]  # a network and its inputs -> what it returns
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_ORDER = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def take_in_order(model: nn.Module, described: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Make a network take inputs by their order, in place, if its forward takes them by name or in a dict.

    Args:
        model: The network. Nothing changes if its first arguments are the inputs already, in this order.
        described: The inputs (see ``describe_inputs``); their names, if they have any, are those of the forward's
            arguments or, if it takes a single dict, its keys. None: the arguments that the forward requires.
    """
    if isinstance(model, (fx.GraphModule, torch.jit.ScriptModule)) or "forward" in vars(model):
        return  # a traced network takes tensors by their order, and an instance's own forward would win
    original = getattr(type(model), _ORIGINAL, type(model))
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [each["name"] for each in described or [] if each.get("name")]
    if len(names) < len(described or []) or not names:
        required = [each for each in parameters if each.kind in _BY_NAME and each.default is each.empty]
        names = [each.name for each in required]
        if all(each.kind in _BY_ORDER for each in required):
            return
    passed_on = _passing(original.forward, parameters, names)
    if passed_on is None:
        release(model)
        return
    _derive(model, original, names, passed_on, {_ORIGINAL: original, _NAMES: tuple(names)})


def release(model: nn.Module) -> None:
    """Undo ``take_in_order``."""
    model.__class__ = getattr(type(model), _ORIGINAL, type(model))


def return_tensors(model: nn.Module, inputs: int) -> None:
    """Make a network with this number of inputs return a tuple of the tensors in what it returns, in place."""
    if isinstance(model, fx.GraphModule):  # torch.export runs its graph, not its forward
        output = next(node for node in model.graph.nodes if node.op == "output")
        with model.graph.inserting_before(output):
            output.args = (model.graph.call_function(_tuple_of_tensors, output.args),)
        model.recompile()
        return
    forward, names = type(model).forward, argument_names(model, inputs)
    _derive(model, type(model), names, lambda net, inputs: _tuple_of_tensors(forward(net, *inputs)))


def _tuple_of_tensors(returned: Any) -> tuple[Tensor, ...]:
    return tuple(tensors_in(returned))


def takes_names(model: nn.Module) -> bool:
    """Return True if ``take_in_order`` changed how a network takes its inputs."""
    return hasattr(type(model), _ORIGINAL)


def input_names(model: nn.Module) -> list[str]:
    """Return the names by which a network that ``takes_names`` takes its inputs, in their order."""
    return list(getattr(type(model), _NAMES))


def argument_names(model: nn.Module, number: int) -> list[str]:
    """Return the names of the first arguments of a network's forward, numbered ones for ``*inputs``."""
    found = [each.name for each in inspect.signature(model.forward).parameters.values() if each.kind in _BY_ORDER]
    return [*found[:number], *(f"input_{each}" for each in range(len(found), number))]


def plain_names(names: Iterable[str]) -> list[str]:
    """Return distinct names that arguments can have: ``image.left`` becomes ``image_left``."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name))  # as Python reads identifiers
        valid = plain.isidentifier() and not keyword.iskeyword(plain) and plain not in ("self", "passed_on")
        plain = plain if valid else f"input_{plain}"
        numbered = (f"{plain}_{number}" for number in count(len(found)))
        found.append(plain if plain not in found else next(each for each in numbered if each not in found))
    return found


def _derive(
    model: nn.Module, original: type, names: list[str], passed_on: _Call, attributes: Mapping[str, Any] | None = None
) -> None:
    """Give a network a class like its own but for a forward with these arguments, and for other attributes."""
    space = {"forward": _forward(names, passed_on), "__module__": original.__module__, **(attributes or {})}
    model.__class__ = types.new_class(original.__name__, (original,), exec_body=lambda body: body.update(space))


def _passing(forward: Callable[..., Any], parameters: list[inspect.Parameter], names: list[str]) -> _Call | None:
    """Return a function of a network and a tuple of its inputs, or None if they can be passed on in their order."""
    by_order = [each.name for each in parameters if each.kind in _BY_ORDER]
    by_name = {each.name for each in parameters if each.kind in _BY_NAME}
    required = [each for each in parameters if each.default is each.empty and each.kind in (*_BY_NAME, *_BY_ORDER)]
    if names == by_order[: len(names)]:
        return None
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if by_name.issuperset(names) or (takes_any and {each.name for each in required} <= set(names)):
        return lambda model, inputs: forward(model, **dict(zip(names, inputs, strict=True)))
    variadic = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    single = len(required) == 1 and required[0].name not in names and not variadic
    if single and (_is_mapping(required[0].annotation) or len(names) > len(by_order)):
        return partial(_pass_dict, forward, required[0], names)
    return None


def _pass_dict(
    forward: Callable[..., Any], parameter: inspect.Parameter, names: list[str], model: nn.Module, inputs: Any
) -> Any:
    """Pass inputs in a dict to a forward that takes a single argument, which may turn out to be a tensor."""
    try:
        return forward(model, dict(zip(names, inputs, strict=True)))
    except (AttributeError, TypeError) as error:
        if _is_mapping(parameter.annotation):
            raise
        raise TypeError(
            f"forward() takes one argument, {parameter.name}, so {' and '.join(names)} were passed in a dict; unless "
            f"it takes dicts, pass data of one input ({first_line(error).removesuffix(', but expected one of:')})"
        ).with_traceback(error.__traceback__) from error


def _is_mapping(annotation: Any) -> bool:
    """Return True if an argument is annotated as a dict, as a type or in quotes."""
    if isinstance(annotation, str):
        return re.search(r"\b(dict|Dict|Mapping|MutableMapping|OrderedDict)\b", annotation) is not None
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and kind is not inspect.Parameter.empty and issubclass(kind, Mapping)


def _forward(names: list[str], passed_on: _Call) -> Any:
    """Return a method with an argument for each name; torch.fx reads them from its code, so ``*inputs`` will not do."""
    scope: dict[str, Any] = {"passed_on": passed_on}
    inputs = ", ".join(plain_names(names))
    exec(f"def forward(self, {inputs}):\n    return passed_on(self, ({inputs},))", scope)
    return scope["forward"]
