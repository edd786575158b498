"""Packed networks as predictors, by numpy and safetensors, and numba to be fast: no torch in the process.

from micronet.runtimes.packed.predictor import PackedNetwork
network = PackedNetwork("int8.packed")
scores = network(images)  # (N, C, H, W) float32, normalised -> (N, K)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.program import Program, read
from micronet.runtimes.packed.batches import BATCH, in_batches, start_pool
from micronet.runtimes.packed.numpy_backend import check_images, count_macs, run

Scoring = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class PackedNetwork:
    """A packed file, ready to run. ``classes``: their names, or None. ``kernel``: what runs it."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Open a file. Raises MicronetError where it is no packed network, or is damaged.

        threads: over images, or where there are fewer images than threads over the rows of each layer.
        """
        self.program = read(Path(path))
        data: dict[str, Any] = self.program.about.get("data") or {}
        self.classes: list[str] | None = data.get("classes")
        with _told():
            self._score, self.kernel = _scoring(self.program, threads)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W), normalised as the network was trained.

        Raises MicronetError where they are of another size or no floats, or the file's layers do not fit one another.
        """
        check_images(self.program, images)
        with _told():
            return self._score(images)

    def macs(self) -> int:
        """Return the multiply-accumulates of an image."""
        with _told():
            return count_macs(self.program)


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a file that was made to confuse raises into one line."""
    try:
        yield
    except (ValueError, ArithmeticError, IndexError, KeyError, TypeError, AssertionError, MemoryError) as error:
        raise MicronetError(f"the packed network's layers do not fit one another ({error}); pack it anew") from error


def _scoring(program: Program, threads: int) -> tuple[Scoring, str]:
    """Return what scores images, and its name: compiled steps where numba is there and they have all, else numpy."""
    try:
        from micronet.runtimes.packed.compiled_backend import CompiledNetwork, compile_steps
        from micronet.runtimes.packed.feature_maps import Unfit
        from micronet.runtimes.packed.kernels import cpu as emit
    except ImportError:
        return _by_numpy(program, threads), "numpy (pip install 'micronet[fast]' for compiled kernels)"
    except RuntimeError as error:  # numba finds no place to keep what it compiles
        return _by_numpy(program, threads), f"numpy ({error})"
    try:
        compile_steps()
    except Exception as error:  # numba or LLVM fails in many ways, none of which is the file's fault
        return _by_numpy(program, threads), f"numpy (numba: {str(error).strip().splitlines()[0]})"
    try:
        return CompiledNetwork(program, threads), emit.WAY
    except Unfit as error:
        return _by_numpy(program, threads), f"numpy (not compiled: {error})"


def _by_numpy(program: Program, threads: int) -> Scoring:
    """Return what scores images without compiled steps."""
    pool = start_pool(threads)
    return lambda images: in_batches(partial(run, program), images, BATCH, threads, pool)
