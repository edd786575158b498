"""Open the GPU on which engines run, with pycuda: its primary context, which torch shares, becomes current."""

import atexit
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from micronet.errors import FailedError, MicronetError, first_line


def gpu_number(device: str | None, path: Path) -> int:
    """Return the number of the GPU for ``cuda``, ``cuda:N`` or None; raise MicronetError for any other device."""
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise MicronetError(f"{path}: an engine runs on an NVIDIA GPU; --device is {device}, allowed: cuda or cuda:N")
    return int(number or 0)


def open_gpu(number: int, path: Path) -> Any:
    """Return ``pycuda.driver`` with a GPU's context current in this thread until the process ends.

    Raises:
        FailedError: pycuda, the driver or the GPU is missing.
        MicronetError: There is no GPU with this number.
    """
    try:
        cuda = import_module("pycuda.driver")
    except ModuleNotFoundError:
        raise FailedError(
            f"{path}: running an engine needs pycuda, which is missing; pip install pycuda (needs the CUDA toolkit)"
        ) from None
    except ImportError as error:  # libcuda.so, which comes with the driver
        raise FailedError(f"{path}: no NVIDIA driver on this machine ({first_line(error)})") from error
    try:
        cuda.init()
        count = cuda.Device.count()
        if count == 0:
            raise FailedError(f"{path}: no NVIDIA GPU to run on")
        if number >= count:
            raise MicronetError(f"--device cuda:{number}: this machine has {count} GPU{'s' * (count > 1)}, from cuda:0")
        _enter(cuda, number)
    except cuda.Error as error:
        raise FailedError(f"{path}: no NVIDIA GPU to run on ({first_line(error)})") from error
    return cuda


@cache
def _enter(cuda: Any, number: int) -> Any:
    context = cuda.Device(number).retain_primary_context()
    context.push()
    atexit.register(context.pop)  # pycuda aborts the process if a context is left on its stack
    return context
