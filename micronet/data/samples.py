"""A split of samples that are not images to normalize: any inputs of a network, each with a target or none."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from micronet.data.split import Split
from micronet.errors import MicronetError, first_line
from micronet.models.device import Inputs
from micronet.models.inputs import describe_inputs, make_inputs


class SampleSplit(Split):
    """Samples ``(input, target)`` by their index; an input is a tensor, or a tuple of them if a network takes several.

    Args:
        samples: The samples: a list, a torch Dataset, or any object with a length and items.
        source: What error messages call it.
        indices: (N,) int64, those of the samples in this split; None: all.
    """

    noun = "sample"

    def __init__(self, samples: Any, source: str, indices: Tensor | None = None) -> None:
        self._samples, self._source = samples, source
        self._indices = torch.arange(len(samples)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def subset(self, indices: Tensor) -> "SampleSplit":
        """Return the samples at ``indices`` as a split."""
        return SampleSplit(self._samples, self._source, self._indices[indices])

    def fingerprint(self) -> str:
        """Return a hash that changes with the choice of samples."""
        return hashlib.sha256(self._indices.numpy().tobytes()).hexdigest()

    def stream(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor | Inputs, list[Any]]]:
        """Yield the inputs, stacked along a new first axis, and the targets of each batch of indices."""
        for indices in batches:
            rows = [self._read(int(index)) for index in self._indices[indices]]
            try:
                stacked = tuple(torch.stack(each) for each in zip(*(inputs for inputs, _ in rows), strict=True))
            except (RuntimeError, ValueError) as error:
                shapes = sorted({str([tuple(x.shape) for x in inputs])[1:-1] for inputs, _ in rows})
                raise MicronetError(
                    f"{self._source}: the inputs of one batch differ in shape ({'; '.join(shapes[:3])}); all "
                    "samples must have the same shapes"
                ) from error
            yield stacked[0] if len(stacked) == 1 else Inputs(stacked), [target for _, target in rows]

    def describe(self) -> list[dict[str, Any]]:
        """Return the shape, without the batch, and the dtype of every input, as JSON values."""
        inputs, _ = self._read(int(self._indices[0]))
        return describe_inputs(inputs)

    def _read(self, index: int) -> tuple[tuple[Tensor, ...], Any]:
        try:
            inputs, target = self._samples[index]
        except MicronetError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise MicronetError(
                f"{self._source}: sample {index} is not a pair (input, target) ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(x, Tensor) for x in inputs):
            names = ", ".join(type(x).__name__ for x in inputs)
            raise MicronetError(
                f"{self._source}: the input of sample {index} has type {names}; expected a torch.Tensor"
            )
        return inputs, target


def example_of(described: list[dict[str, Any]], count: int = 2) -> Tensor | Inputs:
    """Return inputs of the described shapes and dtypes: floats between 0 and 1, other numbers 0.

    Raises MicronetError if the description is damaged.
    """
    try:
        found = make_inputs(described, count)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise MicronetError(f"the file's record of its inputs is corrupted ({error}); recreate the file") from error
    return found[0] if len(found) == 1 else Inputs(found)
