"""Packed networks as predictors. Needs numpy and safetensors, and numba to be fast; imports neither torch nor onnx.

from micronet.runtimes.packed.predictor import PackedNetwork
network = PackedNetwork("int8.packed")
scores = network(images)  # (N, C, H, W) float32, normalised -> (N, K)
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.file_format import read
from micronet.packed.program import Program
from micronet.runtimes.packed.numpy_backend import (
    MAX_BATCH,
    Scores,
    check_images,
    count_macs,
    run,
    score_in_batches,
)  # fmt: skip

Score = Callable[[NDArray[np.float32]], Scores]


class PackedNetwork:
    """A packed file, ready to run.

    classes: the names of its classes, or None. kernel: the instruction set of its kernels, or "numpy" and the reason.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Open a file.

        Args:
            path: a file written by ``micronet pack``.
            threads: they share the images, or the rows of each layer if there are fewer images than threads.

        Raises:
            MicronetError: if the file is damaged or not a packed network.
        """
        self.program = read(Path(path))
        data: dict[str, Any] = self.program.about.get("data") or {}
        self.classes: list[str] | None = data.get("classes")
        with _explain_errors():
            self._score, self.kernel = choose_backend(self.program, threads)

    def __call__(self, images: NDArray[np.float32]) -> Scores:
        """Compute the network's outputs for images.

        Args:
            images: (N, C, H, W), floating point, normalised as for training.

        Returns:
            Scores (N, K), float32, or feature maps (N, C, H, W); a list of them if the network has several outputs.

        Raises:
            MicronetError: if the images have another size or are not floats, or if the file's layers do not fit.
        """
        check_images(self.program, images)
        with _explain_errors():
            return self._score(images)

    def macs(self) -> int:
        """Return the multiply-accumulates per image."""
        with _explain_errors():
            return count_macs(self.program)


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Turn errors from malformed files into MicronetError."""
    try:
        yield
    except (ValueError, ArithmeticError, IndexError, KeyError, TypeError, AssertionError, MemoryError) as error:
        raise MicronetError(
            f"the layers of the packed network do not fit together ({error}); pack the network again"
        ) from error


def choose_backend(program: Program, threads: int) -> tuple[Score, str]:
    """Return the fastest backend that can run a program, and its description: compiled kernels, or else numpy."""
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    numpy = partial(score_in_batches, partial(run, program), max_batch=MAX_BATCH, threads=threads, pool=pool)
    try:
        from micronet.runtimes.packed.compiled_backend import CompiledNetwork, compile_kernels
        from micronet.runtimes.packed.kernels import cpu
        from micronet.runtimes.packed.memory import UnsupportedProgram
    except ImportError:
        return numpy, "numpy (pip install numba for compiled kernels)"
    cpu.check_requested()
    try:
        compile_kernels()
    except Exception as error:  # numba and LLVM fail in many ways, none of which is the file's fault
        return numpy, f"numpy (numba: {str(error).strip().splitlines()[0]})"
    try:
        return CompiledNetwork(program, threads), cpu.INSTRUCTION_SET
    except UnsupportedProgram as error:
        return numpy, f"numpy (compiled kernels do not support {error})"
