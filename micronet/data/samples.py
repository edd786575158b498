"""A split of samples that are not images to normalize: any inputs of a network, each with a target or none."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from micronet.data.split import Split
from micronet.errors import MicronetError, first_line
from micronet.models.device import Inputs
from micronet.models.inputs import describe_inputs, make_inputs


class SampleSplit(Split):
    """Samples ``(input, target)`` by their index; an input is a tensor, or a tuple of them if a network takes several.

    Inputs may have names: an input is then a dict of tensors, or the samples have an attribute ``names``. The samples
    may also have a function ``collate`` from the list of a batch's targets to what the task takes.

    Args:
        samples: The samples: a list, a torch Dataset, or any object with a length and items.
        source: What error messages call it.
        indices: (N,) int64, those of the samples in this split; None: all.
        names: The inputs' names in the order in which the network takes them; None: the order of the samples.
    """

    noun = "sample"

    def __init__(
        self, samples: Any, source: str, indices: Tensor | None = None, names: Sequence[str] | None = None
    ) -> None:
        self._samples, self._source, self._names = samples, source, names
        self._indices = torch.arange(len(samples)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def subset(self, indices: Tensor) -> "SampleSplit":
        """Return the samples at ``indices`` as a split."""
        return SampleSplit(self._samples, self._source, self._indices[indices], self._names)

    def in_order(self, names: Sequence[str]) -> "SampleSplit":
        """Return the samples with their inputs in the order of these names, if those are their names."""
        _, own, _ = self._read(int(self._indices[0]))
        if own is None or set(own) != set(names):
            return self
        return SampleSplit(self._samples, self._source, self._indices, list(names))

    def fingerprint(self) -> str:
        """Return a hash that changes with the choice of samples; of those in memory, with their values too."""
        chosen = hashlib.sha256(self._indices.numpy().tobytes())
        chosen.update(getattr(self._samples, "digest", b""))
        return chosen.hexdigest()

    def stream(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor | Inputs, Any]]:
        """Yield the inputs, stacked along a new first axis, and the targets of each batch of indices."""
        collate = getattr(self._samples, "collate", list)
        for indices in batches:
            rows = [self._read(int(index)) for index in self._indices[indices]]
            try:
                stacked = tuple(torch.stack(each) for each in zip(*(inputs for inputs, *_ in rows), strict=True))
            except (RuntimeError, ValueError) as error:
                shapes = sorted({str([tuple(x.shape) for x in inputs])[1:-1] for inputs, *_ in rows})
                raise MicronetError(
                    f"{self._source}: the inputs of one batch differ in shape ({'; '.join(shapes[:3])}); all "
                    "samples must have the same shapes"
                ) from error
            yield stacked[0] if len(stacked) == 1 else Inputs(stacked), collate([target for *_, target in rows])

    def describe(self) -> list[dict[str, Any]]:
        """Return the shape, without the batch, the dtype and the name, if known, of every input, as JSON values."""
        inputs, names, _ = self._read(int(self._indices[0]))
        return describe_inputs(inputs, names)

    def _read(self, index: int) -> tuple[tuple[Tensor, ...], Sequence[str] | None, Any]:
        """Return a sample's inputs, their names and its target."""
        try:
            inputs, target = self._samples[index]
        except MicronetError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise MicronetError(
                f"{self._source}: sample {index} is not a pair (input, target) ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error
        names = getattr(self._samples, "names", None)
        if isinstance(inputs, Mapping):
            names, inputs = list(map(str, inputs)), tuple(inputs.values())
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(x, Tensor) for x in inputs):
            names = ", ".join(type(x).__name__ for x in inputs)
            raise MicronetError(
                f"{self._source}: the input of sample {index} has type {names}; expected torch.Tensor, or a "
                "tuple or dict of them"
            )
        if self._names is None or names is None:
            return inputs, names, target
        by_name = dict(zip(names, inputs, strict=True))
        if by_name.keys() != set(self._names):
            raise MicronetError(
                f"{self._source}: sample {index} has the inputs {', '.join(names)}; expected {', '.join(self._names)}"
            )
        return tuple(by_name[name] for name in self._names), self._names, target


def example_of(described: list[dict[str, Any]], count: int = 2) -> Tensor | Inputs:
    """Return inputs of the described shapes and dtypes: floats between 0 and 1, other numbers 0.

    Raises MicronetError if the description is damaged.
    """
    try:
        found = make_inputs(described, count)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise MicronetError(f"the file's record of its inputs is corrupted ({error}); recreate the file") from error
    return found[0] if len(found) == 1 else Inputs(found)
