"""Compiled modules and scripted functions, run as the Python they were made of."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def uncompiled_modules() -> Iterator[None]:
    """Run what torch.compile made of modules, and torch.jit.script of functions, as plain Python in this context."""
    compiler = "torch._dynamo" in sys.modules  # there are none without it, and importing it takes seconds
    scripted: Any = torch.jit.ScriptFunction
    before, scripted.__call__ = scripted.__call__, _call_python  # no tracer sees what a scripted function computes
    try:
        with torch.compiler.set_stance("force_eager") if compiler else nullcontext():
            yield
    finally:
        scripted.__call__ = before


_call_compiled: Any = torch.jit.ScriptFunction.__call__


def _call_python(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the Python function that was scripted; torch keeps it for its compiler under a private name."""
    python = getattr(function, "_torchdynamo_inline", None)
    return _call_compiled(function, *args, **kwargs) if python is None else python(*args, **kwargs)
