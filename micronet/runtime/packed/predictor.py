"""Packed networks as predictors. The core of it needs numpy and safetensors alone: no torch in the process.

from micronet.runtime.packed.predictor import PackedNetwork
network = PackedNetwork("int8.packed")
scores = network(images)  # (N, C, H, W) float32, normalised -> (N, K)
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.runtime.packed.program import read
from micronet.runtime.packed.run import run

BATCH = 32  # images at once: what lies between layers stays in the caches


class PackedNetwork:
    """A packed file, ready to run. ``classes``: their names, or None."""

    def __init__(self, path: str | Path) -> None:
        """Raises MicronetError where the file is no packed network, or is damaged."""
        self.program = read(Path(path))
        data: dict[str, Any] = self.program.about.get("data") or {}
        self.classes: list[str] | None = data.get("classes")

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W), normalised as the network was trained.

        Raises MicronetError where they are of another size, or the file's layers do not fit one another.
        """
        starts = range(0, len(images), BATCH)
        try:
            return np.concatenate([run(self.program, images[start : start + BATCH]) for start in starts])
        except (ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
            raise MicronetError(
                f"the packed network's layers do not fit one another ({error}); pack it anew"
            ) from error
