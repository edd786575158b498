"""The names of the arrays of a data set with labels: ``x_train``, ``y_train``, ``x_test``, ``y_test``.

A network of several inputs has ``ids_train`` and ``ids_test``, ``mask_train`` and ``mask_test``, and so on.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

PARTS = ("train", "test")
LABELS = {f"y_{part}" for part in PARTS}
IMAGES = "x_train"


def is_labelled(names: Collection[str]) -> bool:
    """Return True if arrays of these names are inputs and labels for training and testing."""
    return {*names} >= LABELS and bool(_inputs(names))


def are_images(stored: Mapping[str, Any]) -> bool:
    """Return True if the inputs of a data set with labels are images; ``stored``: arrays or their headers."""
    return IMAGES in stored and stored[IMAGES].dtype == np.uint8


def input_arrays(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the inputs and the arrays that hold them: of a data set with labels, those for training.

    If ``x_train`` holds images, all other arrays are ignored. ``stored``: arrays or their headers, by their names.
    """
    if not is_labelled(stored):
        return {name: name for name in stored}
    return {"x": IMAGES} if are_images(stored) else {name: f"{name}_{PARTS[0]}" for name in _inputs(stored)}


def _inputs(names: Collection[str]) -> list[str]:
    """Return the inputs of which there are arrays for a part of the data."""
    suffix = f"_{PARTS[0]}"
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix) and name not in LABELS]
