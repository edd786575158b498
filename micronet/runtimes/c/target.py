"""C as a target of ``export``: a folder of code, and such a folder as a network."""

import logging
from pathlib import Path
from typing import Any

import onnx

from micronet.errors import MicronetError
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.c.predictor import CPredictor, compiler
from micronet.runtimes.c.sizes import layer_names
from micronet.runtimes.c.writer import CODE, PROGRAM, c_code, folder_files
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.packed.adapter import PackedPredictor

TITLE, PAIRS = "C", False
STORES_FP16 = False
FILES = (*CODE, PROGRAM)


class UncompiledFolder(PackedPredictor):
    """The packed network that a folder's code was written from, in place of that code where there is no compiler."""

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        super().__init__(folder / PROGRAM, options)

    def integer_layers(self) -> dict[str, Any] | None:
        """Return None: nothing of the code was executed, so nothing of it is timed."""
        return None


def write(proto: onnx.ModelProto, folder: Path, *, fp16: bool = False) -> dict[str, Any]:
    """Write a network's code into a folder; return its sizes. Raises MicronetError if an operator is not supported."""
    program = pack_model(proto, "--target c")
    code = c_code(program)
    for name, content in folder_files(program, code).items():
        (folder / name).write_bytes(content)
    return {"sizes": code.sizes.to_json()}


def open_folder(folder: Path, note: dict[str, Any], options: RuntimeOptions) -> CPredictor | UncompiledFolder:
    """Open a folder that ``write`` wrote, with what it returned.

    Without a C compiler, only a new folder, whose note does not list its files yet, is opened: ``export`` writes code
    for other machines, too, and checks the network in the packed runtime then.
    """
    if "files" not in note:
        try:
            compiler()
        except MicronetError:
            logging.getLogger(__name__).warning(
                "the C code was not compiled here, where there is no C compiler: the packed network was compared with "
                "torch in its place; run make check in the folder on a machine with a compiler"
            )
            return UncompiledFolder(folder, options)
    return CPredictor(folder, options, layer_names(note))
