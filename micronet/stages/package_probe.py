"""Imports packages, and prints a line of JSON on each. ``doctor`` runs this file in a process of its own.

A broken package may end the process that imports it, print, or raise anything. Nothing of micronet is needed here.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def main(names: list[str]) -> None:
    """Import packages in order; print a line of JSON on each: ``name``, and ``problem`` or what it says of itself."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO then uses a stub, and writes nothing
    for name in names:
        print(json.dumps(_probe(name)), file=out, flush=True)  # the parent reads it
    os._exit(0)  # some libraries crash as they are unloaded


def _probe(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except BaseException as error:
        return {"name": name, "problem": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
    about = {"name": name, "version": str(getattr(module, "__version__", "")).partition("-")[0]}
    details = _DETAILS.get(name, lambda _: {})
    with suppress(Exception):
        about |= details(module)
    return about


def _torch(torch: Any) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"gpus": gpus if torch.cuda.is_available() else [], "cuda": torch.version.cuda}


def _numba(numba: Any) -> dict[str, Any]:
    from micronet.runtimes.packed.kernels.cpu import INSTRUCTION_SET

    return {"kernel": INSTRUCTION_SET}


_DETAILS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": _torch,
    "numba": _numba,
    "onnxruntime": lambda module: {"providers": module.get_available_providers()},
    "openvino": lambda module: {"devices": module.Core().available_devices},
}

if __name__ == "__main__":
    main(sys.argv[1:])
