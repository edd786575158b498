"""Import TensorRT or TensorRT-RTX and collect its log messages; open the GPU with pycuda.

The two libraries share one API. TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds on any
machine, without a GPU, and completes the engine on the GPU that runs it.
"""

import atexit
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from micronet.errors import FailedError, MicronetError, count, first_line, unknown

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_HELP = {
    "auto": "run pip install tensorrt-rtx-cu13 (can build without a GPU) or pip install tensorrt (requires a GPU)",
    "tensorrt": "run pip install tensorrt",
    "tensorrt-rtx": "run pip install tensorrt-rtx-cu13",
}


def library(backend: str = "auto") -> Any:
    """Import ``tensorrt``, ``tensorrt-rtx`` or, for ``auto``, the first of them that is installed.

    Raises MicronetError if the name is unknown, FailedError if the library is not installed or does not load.
    """
    if backend not in _HELP:
        raise unknown("backend", backend, _HELP)
    failure = ""
    for name in MODULES if backend == "auto" else [backend]:
        try:
            return import_module(MODULES[name])
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a wheel without its CUDA libraries raises OSError, RuntimeError, …
            failure = f" ({name} is installed but cannot be loaded: {first_line(error)})"
    subject = "neither TensorRT nor TensorRT-RTX is" if backend == "auto" else f"{backend} is not"
    raise FailedError(f"{subject} available{failure}; {_HELP[backend]}")


def backend_of(trt: Any) -> Backend:
    """Return the backend's name of a module from ``library``."""
    return "tensorrt-rtx" if trt.__name__ == MODULES["tensorrt-rtx"] else "tensorrt"


@cache
def logger(trt: Any) -> Any:
    """Return the process's only logger for a library; the library keeps the first it gets and ignores later ones.

    ``errors``: the error messages since the last ``clear``. ``layers``: a detailed build's list of the engine's layers.
    """

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]  # a base known when it is installed
        """Collects errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 requires this explicit call
            self.clear()

        def log(self, severity: Any, text: str) -> None:
            """Store a message."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            elif text.startswith("Layers:"):
                self.layers = text

        def clear(self) -> None:
            """Drop all messages."""
            self.errors: list[str] = []
            self.layers = ""

    return Collector()


def gpu_number(device: str | None, path: Path) -> int:
    """Return the number of the GPU for ``cuda``, ``cuda:N`` or None; raise MicronetError for any other device."""
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise MicronetError(f"{path}: engines only run on NVIDIA GPUs, but --device is {device}; use cuda or cuda:N")
    return int(number or 0)


def open_gpu(number: int, path: Path) -> Any:
    """Return ``pycuda.driver`` with a GPU's context current in this thread until the process ends; torch shares it.

    Raises FailedError if pycuda, the driver or any GPU is missing, MicronetError if no GPU has this number.
    """
    try:
        cuda = import_module("pycuda.driver")
    except ModuleNotFoundError:
        raise FailedError(
            f"{path}: running an engine requires pycuda; run pip install pycuda (requires the CUDA toolkit)"
        ) from None
    except ImportError as error:  # libcuda.so, which comes with the driver
        raise FailedError(
            f"{path}: no NVIDIA driver found on this machine ({first_line(error)}); install one, or use another machine"
        ) from error
    try:
        cuda.init()
        found = cuda.Device.count()
        if found == 0:
            raise FailedError(f"{path}: no NVIDIA GPU found on this machine; use another machine")
        if number >= found:
            raise MicronetError(f"--device cuda:{number}: this machine has {count(found, 'GPU')}, numbered from cuda:0")
        _enter(cuda, number)
    except cuda.Error as error:
        raise FailedError(
            f"{path}: no NVIDIA GPU found on this machine ({first_line(error)}); use another machine"
        ) from error
    return cuda


@cache
def _enter(cuda: Any, number: int) -> Any:
    context = cuda.Device(number).retain_primary_context()
    context.push()
    atexit.register(context.pop)  # pycuda aborts the process if a context is left on its stack
    return context
