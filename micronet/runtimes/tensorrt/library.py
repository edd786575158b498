"""The TensorRT library: which of the two is installed, and what it says.

TensorRT and TensorRT-RTX are two libraries with one API: the first builds and runs on the GPU it is on, the second
builds on any machine, without a GPU, and finishes the engine on the GPU that runs it.
"""

from functools import cache
from importlib import import_module
from typing import Any, Literal

from micronet.errors import FailedError, first_line, unknown

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_HELP = {
    "auto": "pip install 'micronet[tensorrt-rtx]' builds without a GPU, 'micronet[tensorrt]' builds on one",
    "tensorrt": "pip install 'micronet[tensorrt]'",
    "tensorrt-rtx": "pip install 'micronet[tensorrt-rtx]'",
}


def library(backend: str = "auto") -> Any:
    """Import ``tensorrt``, ``tensorrt-rtx`` or, for ``auto``, the first of them that is there.

    Raises MicronetError for another name, FailedError where the library is not installed or does not load.
    """
    if backend not in _HELP:
        raise unknown("backend", backend, _HELP)
    names = list(MODULES) if backend == "auto" else [backend]
    refused = ""
    for name in names:
        try:
            return import_module(MODULES[name])
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a wheel whose CUDA libraries are missing raises OSError, RuntimeError, …
            refused = f" ({name} is installed but does not load: {first_line(error)})"
    subject = "neither TensorRT nor TensorRT-RTX is" if backend == "auto" else f"{backend} is not"
    raise FailedError(f"{subject} installed{refused}; {_HELP[backend]}")


def backend_of(trt: Any) -> Backend:
    """Return which of the two a module from ``library`` is."""
    return "tensorrt-rtx" if trt.__name__ == MODULES["tensorrt-rtx"] else "tensorrt"


@cache
def logger(trt: Any) -> Any:
    """Return the one logger of a process for a library: an ``ILogger`` with its messages in ``lines``.

    ``layers``: what a detailed build told of the engine's layers.

    The library keeps the first logger it is given and ignores later ones, hence one for all who build and run.
    ``clear()`` empties ``lines``, ``errors()`` returns the messages of errors alone.
    """

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]  # a base known when it is installed
        """Keeps what is a warning or worse."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 asks for its own constructor by name
            self.lines: list[str] = []
            self._errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            """Take a message."""
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
            """Forget all messages."""
            self.lines.clear()
            self._errors.clear()
            self.layers = ""

    return Collector()
