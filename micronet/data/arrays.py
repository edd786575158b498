"""Arrays as a network's inputs, without labels: an .npz file with one array per input, or .npy files.

The names of the arrays in an .npz file are those of the arguments of the network's forward, or the keys of the dict
that it takes; under other names, their order is that of the arguments.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from micronet.data.dataset import DataSource
from micronet.data.labelled_names import is_labelled
from micronet.data.npz import read_npy, read_npz
from micronet.data.samples import SampleSplit
from micronet.data.split import random_subset
from micronet.errors import MicronetError, count

TEST_SHARE = 0.25
LEAST_TO_SPLIT = 8  # fewer samples serve for calibration and for the report alike


def open_inputs(place: Path) -> DataSource | None:
    """Open inputs without labels; return None if the place is not such a file or folder.

    A quarter of the samples, chosen at random, are the test samples.
    """
    samples: Any
    if place.suffix == ".npy" and place.is_file():
        samples = ArraySamples({place.stem: read_npy(place)}, place)
    elif place.suffix == ".npz" and place.is_file():
        arrays = read_npz(place)
        if is_labelled(arrays):
            return None
        samples = ArraySamples(arrays, place)
    elif place.is_dir() and (files := sorted(place.glob("*.npy"))):
        samples = FileSamples(files)
    else:
        return None
    whole = SampleSplit(samples, str(place))
    if len(whole) < LEAST_TO_SPLIT:
        return DataSource(
            lambda: whole, lambda: whole, validation=lambda: whole, is_images=False, tests_training_samples=True
        )
    order = random_subset(whole, len(whole), seed=0)
    tested = round(len(whole) * TEST_SHARE)
    train, test = order.subset(torch.arange(tested, len(whole))), order.subset(torch.arange(tested))
    return DataSource(lambda: train, lambda: test, is_images=False)


class ArraySamples:
    """Samples along the first axis of several arrays."""

    def __init__(self, arrays: dict[str, NDArray[Any]], place: Path) -> None:
        sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
            if sizes and set(sizes.values()) == {0}:
                raise MicronetError(f"{place} holds no samples; the first axis of each array counts them")
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
            raise MicronetError(
                f"the arrays in {place} must have the same length, the number of samples, along their first axis; got "
                f"{shapes}"
            )
        self.names = list(arrays) if place.suffix == ".npz" else None
        self._inputs = [as_tensor(array, f"{place}: {name}") for name, array in arrays.items()]

    def __len__(self) -> int:
        return len(self._inputs[0])

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], None]:
        return tuple(each[index] for each in self._inputs), None


class FileSamples:
    """Files of one array each, a sample for a network with one input."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, None]:
        path = self._files[index]
        return as_tensor(read_npy(path), str(path)), None


def as_tensor(array: NDArray[Any], name: str) -> Tensor:
    """Return an array as a tensor: floats as float32, integers and booleans as they are."""
    if array.dtype.kind not in "fiub":
        raise MicronetError(f"{name} has the type {array.dtype}; expected floats, integers or booleans")
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            bad = count(int((~np.isfinite(array)).sum()), "value")
            raise MicronetError(f"{name} has {bad} that are NaN or infinite in float32; remove them")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native))
