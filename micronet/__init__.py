"""micronet: make a neural network small and fast and put it into production.

The Python API; every name is imported when it is first used, so that ``micronet --help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micronet.api import export_onnx, fuse, load, prune, quantize, save
    from micronet.artifact.artifact import Artifact
    from micronet.errors import MicronetError
    from micronet.quantization.calibrate import calibrate, freeze, observing

_HOME = {
    "quantize": "micronet.api",
    "fuse": "micronet.api",
    "prune": "micronet.api",
    "save": "micronet.api",
    "export_onnx": "micronet.api",
    "load": "micronet.api",
    "calibrate": "micronet.quantization.calibrate",
    "freeze": "micronet.quantization.calibrate",
    "observing": "micronet.quantization.calibrate",
    "Artifact": "micronet.artifact.artifact",
    "MicronetError": "micronet.errors",
}

__all__ = [
    "Artifact",
    "MicronetError",
    "calibrate",
    "export_onnx",
    "freeze",
    "fuse",
    "load",
    "observing",
    "prune",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'micronet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
