"""The 8-bit pixels behind normalised images, for networks that normalise their input by themselves."""

import numpy as np
from numpy.typing import NDArray

from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError


def to_pixels(images: NDArray[np.float32], spec: DataSpec) -> NDArray[np.uint8]:
    """Return the pixels (N, C, H, W) that normalised images were made from.

    Raises MicronetError where the normalisation is not known.
    """
    if spec.std is None or spec.mean is None:
        raise MicronetError(
            "the model takes 8-bit pixels and does not tell how its images are normalised; export it with micronet"
        )
    std, mean = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (spec.std, spec.mean))
    return ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
