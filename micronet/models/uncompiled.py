"""A decorator for methods that torch.compile must not trace."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a method as plain Python inside a compiled network, as ``torch.compiler.disable`` does.

    ``torch.compiler.disable`` imports torch's compiler, which takes two seconds, so it is applied at the first call
    after something else has imported the compiler.
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
