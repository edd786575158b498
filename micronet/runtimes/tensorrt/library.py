"""Import TensorRT or TensorRT-RTX, and collect its log messages.

The two libraries share one API. TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds on any
machine, without a GPU, and completes the engine on the GPU that runs it.
"""

from functools import cache
from importlib import import_module
from typing import Any, Literal

from micronet.errors import FailedError, first_line, unknown

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_HELP = {
    "auto": "pip install tensorrt-rtx-cu13 (builds without a GPU), or pip install tensorrt (builds on one)",
    "tensorrt": "pip install tensorrt",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}


def library(backend: str = "auto") -> Any:
    """Import ``tensorrt``, ``tensorrt-rtx`` or, for ``auto``, the first of them that is installed.

    Raises:
        MicronetError: The name is unknown.
        FailedError: The library is not installed, or does not load.
    """
    if backend not in _HELP:
        raise unknown("backend", backend, _HELP)
    names = list(MODULES) if backend == "auto" else [backend]
    failure = ""
    for name in names:
        try:
            return import_module(MODULES[name])
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a wheel without its CUDA libraries raises OSError, RuntimeError, …
            failure = f" ({name} is installed but does not load: {first_line(error)})"
    subject = "neither TensorRT nor TensorRT-RTX is" if backend == "auto" else f"{backend} is not"
    raise FailedError(f"{subject} installed{failure}; {_HELP[backend]}")


def backend_of(trt: Any) -> Backend:
    """Return the backend's name of a module from ``library``."""
    return "tensorrt-rtx" if trt.__name__ == MODULES["tensorrt-rtx"] else "tensorrt"


@cache
def logger(trt: Any) -> Any:
    """Return the process's only logger for a library: an ``ILogger`` that collects messages.

    There is one because the library keeps the first logger it gets and ignores later ones. ``lines`` holds warnings
    and errors, ``errors()`` returns the errors only, ``layers`` is a detailed build's description of the engine's
    layers, and ``clear()`` drops everything.
    """

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]  # a base known when it is installed
        """Collects warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 requires this explicit call
            self.lines: list[str] = []
            self._errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            """Store a message."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(text)
            elif severity != trt.ILogger.WARNING:
                self.layers = text if text.startswith("Layers:") else self.layers
                return
            self.lines.append(text)

        def errors(self) -> list[str]:
            """Return the errors since the last ``clear``, oldest first."""
            return list(self._errors)

        def clear(self) -> None:
            """Drop all messages."""
            self.lines.clear()
            self._errors.clear()
            self.layers = ""

    return Collector()
