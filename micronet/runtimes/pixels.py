"""Recover 8-bit pixels from normalized images, for networks that normalize their input themselves."""

import numpy as np
from numpy.typing import NDArray

from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError


def to_pixels(images: NDArray[np.float32], spec: DataSpec) -> NDArray[np.uint8]:
    """Return the pixels, (N, C, H, W) uint8, of normalized images, (N, C, H, W) float32.

    Raises:
        MicronetError: The mean and standard deviation are not known.
    """
    if spec.std is None or spec.mean is None:
        raise MicronetError(
            "the model takes 8-bit pixels but does not record how its images are normalized; export it again with "
            "micronet export-onnx --embed-preprocessing"
        )
    std, mean = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (spec.std, spec.mean))
    return ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
