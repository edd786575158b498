"""C as a target of ``export``: a folder of code, and such a folder as a network."""

from pathlib import Path
from typing import Any

import onnx

from micronet.packed.from_onnx import pack_model
from micronet.runtimes.c.predictor import CPredictor
from micronet.runtimes.c.writer import CODE, PROGRAM, c_code, folder_files
from micronet.runtimes.config import RuntimeOptions

TITLE, PAIRS = "C", False
STORES_FP16 = False
FILES = (*CODE, PROGRAM)


def write(proto: onnx.ModelProto, folder: Path, *, fp16: bool = False) -> dict[str, Any]:
    """Write a network's code into a folder; return its sizes. Raises MicronetError if an operator is not supported."""
    program = pack_model(proto, "--target c")
    code = c_code(program)
    for name, content in folder_files(program, code).items():
        (folder / name).write_bytes(content)
    return {"sizes": code.sizes.to_json()}


def open_folder(folder: Path, note: dict[str, Any], options: RuntimeOptions) -> CPredictor:
    """Open a folder that ``write`` wrote, with what it returned."""
    return CPredictor(folder, options)
