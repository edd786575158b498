"""Networks in C as predictors: their code is compiled by the user's compiler and called in this process."""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.core.files import temporary_folder
from micronet.core.machine import usable_threads, words_in
from micronet.data.spec import DataSpec
from micronet.errors import MicronetError
from micronet.packed.file_format import read
from micronet.packed.program import Program
from micronet.runtimes.c.lowering import takes_pixels
from micronet.runtimes.c.weights import LAYER_KERNELS
from micronet.runtimes.c.writer import CODE, PROGRAM, CCode, c_code
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import to_pixels
from micronet.runtimes.packed.numpy_backend import Scores, check_images, count_macs

FLAGS = (("-O3", "-march=native"), ("-O3",))  # in turn: not every compiler knows its own processor
TIMEOUT = 600  # seconds for a compilation
FLOAT_LAYER = "float weights or a float input"
PREDICT, NORMALIZED = "micronet_predict", "micronet_predict_normalized"  # the second, of floats, not in products


class CNetwork:
    """A program's code, compiled with CC (default: cc) and CFLAGS (default: -O3 -march=native) and loaded.

    files: the texts of the files in CODE. threads: they share the images; each has a library of its own, because its
    memory is static. Images that do not come from pixels are given to code for pixels after its normalization. names:
    what the layers are called, by their operations' indices.
    """

    runtime = "c"

    def __init__(
        self, program: Program, code: CCode, files: dict[str, str], threads: int = 1,
        names: Mapping[int, str] | None = None,
    ) -> None:  # fmt: skip
        self.program, self.code, self._names = program, code, names or {}
        data = program.about.get("data")
        self.data = DataSpec.from_json(data) if data else None
        self.stages = [str(stage) for stage in program.about.get("stages") or []]
        self.params = program.weights
        self._libraries = _load(files, threads)
        self._lock = Lock()  # the memory of a library holds one image at a time
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._sizes = [int(np.prod(each.shape)) for each in code.outputs]

    def __call__(self, images: Any) -> Scores:
        """Compute the network's outputs for normalized images (N, C, H, W) floats: scores (N, K), or maps (N, C, H, W).

        Raises:
            MicronetError: if the images have another size or are not floats.
        """
        check_images(self.program, images)
        integer = self.code.outputs[0].integer
        given, name = self._inputs(images)
        inputs = np.ascontiguousarray(given.transpose(0, 2, 3, 1))
        predictors = [_function(library, name) for library in self._libraries]
        scores: NDArray[Any] = np.zeros((len(images), sum(self._sizes)), np.int32 if integer else np.float32)
        count = len(predictors)

        def predict(number: int) -> None:
            for image, row in zip(inputs[number::count], scores[number::count], strict=True):
                predictors[number](image.ctypes.data, row.ctypes.data)

        with self._lock:
            if self._pool and len(images) > 1:
                list(self._pool.map(predict, range(count)))
            else:
                for number in range(count):
                    predict(number)
        reals: NDArray[np.float32] = scores.astype(np.float32)
        if integer:
            reals *= np.float32(self.code.outputs[0].map.scale)
        parts = np.split(reals, np.cumsum(self._sizes)[:-1], 1)
        found = [part.reshape(-1, *each.shape) for part, each in zip(parts, self.code.outputs, strict=True)]
        return found[0] if len(found) == 1 else found

    def _inputs(self, images: NDArray[np.float32]) -> tuple[NDArray[Any], str]:
        """Return what the code takes, and the name of the function that takes it."""
        if not takes_pixels(self.program):
            return images.astype(np.float32), PREDICT
        assert self.data is not None
        try:
            return to_pixels(images, self.data), PREDICT
        except MicronetError:
            if not hasattr(self._libraries[0], NORMALIZED):  # code that --trust-code allowed
                raise
            return images.astype(np.float32), NORMALIZED

    def macs(self, *shapes: tuple[int, ...]) -> int:
        """Return the multiply-accumulates per image; the network takes only one image shape."""
        return count_macs(self.program)

    def memory(self) -> str:
        """Return what the code needs of flash and RAM, in words."""
        return self.code.sizes.describe()

    def integer_layers(self) -> dict[str, Any] | None:
        """Return which layers are computed in integers, as ``onnx.integers.count_layers`` does; None if none is.

        A layer without a name is called by its operation's index, as in ``inspect``.
        """
        found = {"convolutions": {"integer": 0, "all": 0}, "linear": {"integer": 0, "all": 0}}
        left = {}
        # Calls that convert a layer's input or return its scores belong to its operation too.
        kernels = {call.operation: call.kernel for call in self.code.calls if call.kernel in LAYER_KERNELS}
        for index, operation in enumerate(self.program.operations):
            if operation.weight is not None:
                kind = "linear" if operation.kind == "linear" else "convolutions"
                integer = not kernels[index].endswith("_floats")
                found[kind]["all"] += 1
                found[kind]["integer"] += integer
                if not integer:
                    left[self._names.get(index) or f"operation {index}"] = FLOAT_LAYER
        return {**found, "float": left} if found["convolutions"]["integer"] + found["linear"]["integer"] else None


class CPredictor(CNetwork):
    """A folder that ``write_c`` wrote.

    Its C code is only compiled if it is what this version of micronet writes for the program in the folder, or with
    ``--trust-code``: somebody else's code could do anything.
    """

    def __init__(self, folder: Path, options: RuntimeOptions, names: Mapping[int, str] | None = None) -> None:
        if options.device not in (None, "cpu"):
            raise MicronetError(f"{folder}: networks in C only run on the CPU; drop --device {options.device}")
        program = read(folder / PROGRAM)
        code = c_code(program)
        files = {name: _text(folder / name) for name in CODE}
        changed = [name for name in CODE if files[name] != code.files[name]]
        if changed and not options.trust_code:
            raise MicronetError(
                f"{folder / changed[0]} is not what this version of micronet writes for the network; export it again, "
                "or add --trust-code to compile and run the code in the folder"
            )
        super().__init__(program, code, files, options.threads or usable_threads(), names)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MicronetError(f"{path} cannot be read ({error}); export the network again") from error


def compiler() -> list[str]:
    """Return the user's C compiler: CC, or cc. Raises MicronetError if there is none."""
    command = words_in("CC") or ["cc"]
    if shutil.which(command[0]) is None:
        raise MicronetError(
            f"running a network in C needs a C compiler, but {command[0]} is not one; install one (apt install gcc) or "
            "set CC to yours"
        )
    return command


def _compile(source: Path, library: Path, flags: Sequence[str]) -> str:
    """Compile the code into a library; return the compiler's first error, or nothing."""
    command = [*compiler(), "-std=c99", "-DMICRONET_NORMALIZED", *flags]
    arguments = [*command, "-shared", "-fPIC", str(source), "-o", str(library)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shlex.join(command)}: {error}"
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines()
    return f"{shlex.join(command)}: {next((line for line in lines if 'error' in line), (lines or ['it failed'])[0])}"


def _load(files: dict[str, str], copies: int) -> list[Any]:
    """Compile the code into a library and load it; return its copies."""
    with temporary_folder() as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        library = folder / "model.so"
        given = words_in("CFLAGS")
        for flags in [given] if given else FLAGS:
            if not (reason := _compile(folder / "model.c", library, flags)):
                break
        else:
            raise MicronetError(f"the network could not be compiled: {reason}")
        found: list[Any] = []
        for number in range(copies):
            copy = library.with_name(f"model{number}.so")  # the same file would be loaded once
            shutil.copyfile(library, copy)
            try:
                found.append(ctypes.CDLL(str(copy)))
                _function(found[-1], PREDICT)
            except (OSError, AttributeError) as error:
                raise MicronetError(
                    f"the network was compiled, but its code cannot be loaded on this machine ({platform.machine()}, "
                    f"{platform.system()}): {shlex.join(compiler())} (CC) with the flags "
                    f"{os.environ.get('CFLAGS') or shlex.join(flags)!r} (CFLAGS) makes code for another one; set CC to "
                    "a compiler for this machine, such as gcc"
                ) from error
    return found


def _function(library: Any, name: str) -> Any:
    """Return a function of a library from an image and scores. Raises AttributeError if it has none of that name."""
    found = getattr(library, name)
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return found
