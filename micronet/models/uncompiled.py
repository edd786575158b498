"""What torch.compile must not trace, without importing torch's compiler for that, which takes two seconds."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.optim import Optimizer

_P = ParamSpec("_P")
_R = TypeVar("_R")
_O = TypeVar("_O", bound=Optimizer)


def uncompiled(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a method as plain Python inside a compiled network, as ``torch.compiler.disable`` does.

    ``torch.compiler.disable`` imports torch's compiler, so it is applied at the first call after something else has
    imported the compiler.
    """
    disabled: Callable[_P, _R] | None = None

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return method(*args, **kwargs)
            disabled = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
            # Private, but without it torch compiles `call` for every class until its limit, with a warning.
            torch._dynamo.decorators.skip(call)
        return disabled(*args, **kwargs)

    return call


def uncompiled_optimizer(kind: type[_O]) -> type[_O]:
    """Return an optimizer that takes the same steps, but does not import the compiler only to be kept from it."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return cast(type[_O], type(kind.__name__, (kind,), methods))
