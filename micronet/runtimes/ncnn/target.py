"""ncnn as a target of ``export``: a folder with its files, and such a folder as a network."""

from pathlib import Path
from typing import Any

import onnx

from micronet.onnx.integers import count_layers
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.ncnn.files import BIN, PARAM, write_ncnn
from micronet.runtimes.ncnn.predictor import NcnnPredictor

TITLE, PAIRS = "ncnn", False
INT8 = "int8"
STORES_FP16 = True
FILES = (PARAM, BIN)


class NcnnFolder(NcnnPredictor):
    """A network in a folder that ``write`` wrote."""

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what ncnn computes in integers, as ``onnx.integers.count_layers`` does; None for a float network."""
        computed = self.layers()
        if INT8 not in computed.values():
            return None
        linear = {layer.name for layer in self.file.layers if layer.kind == "InnerProduct"}
        return count_layers(
            ("linear" if name in linear else "convolutions", name, None if how == INT8 else how.removeprefix("float: "))
            for name, how in computed.items()
        )


def write(proto: onnx.ModelProto, folder: Path, *, fp16: bool = False) -> dict[str, Any]:
    """Write a network's files into a folder; return what ``write_ncnn`` does. Raises MicronetError as it does."""
    return write_ncnn(pack_model(proto, "--target ncnn"), folder, fp16_storage=fp16)


def open_folder(folder: Path, note: dict[str, Any], options: RuntimeOptions) -> NcnnFolder:
    """Open a folder that ``write`` wrote, with what it returned."""
    return NcnnFolder(folder, note, options)
