"""Packed networks as predictors, by numpy and safetensors, and numba to be fast: no torch in the process.

from micronet.runtime.packed.predictor import PackedNetwork
network = PackedNetwork("int8.packed")
scores = network(images)  # (N, C, H, W) float32, normalised -> (N, K)
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.runtime.packed.program import Program, read
from micronet.runtime.packed.run import Step, plain, run

BATCH = 8  # images at once: what lies between layers stays in the caches


class PackedNetwork:
    """A packed file, ready to run. ``classes``: their names, or None. ``kernel``: what runs its binary layers."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Open a file; ``threads``: over images. Raises MicronetError where it is no packed network, or is damaged."""
        self.program = read(Path(path))
        data: dict[str, Any] = self.program.about.get("data") or {}
        self.classes: list[str] | None = data.get("classes")
        self._step, self.kernel = _steps(self.program)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._threads = threads

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W), normalised as the network was trained.

        Raises MicronetError where they are of another size, or the file's layers do not fit one another.
        """
        size = max(1, min(BATCH, -(-len(images) // self._threads)))
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        try:
            scores = map(self._run, parts) if self._pool is None else self._pool.map(self._run, parts)
            return np.concatenate(list(scores))
        except (ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
            raise MicronetError(
                f"the packed network's layers do not fit one another ({error}); pack it anew"
            ) from error

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return run(self.program, images, self._step)


def _steps(program: Program) -> tuple[Step, str]:
    """Return what runs the operations: compiled kernels where a binary layer has use for them and numba is there."""
    if not any(operation.kind == "threshold" for operation in program.operations):
        return plain, "numpy"
    try:
        from micronet.runtime.packed import kernels
        from micronet.runtime.packed.fast import FastSteps
    except ImportError:
        return plain, "numpy (pip install 'micronet[fast]' for compiled kernels)"
    return FastSteps(program), kernels.WAY
