"""Data that the Python API gives in memory: batches of inputs, with labels or without, in place of a data set's name.

A batch is a tensor, a tuple that begins with the inputs (``(x, y)``, ``(left, right, y)``, ``({"image": x}, y)``), or a
dict of inputs. What the network's forward does not take are the labels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Self

import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from micronet.data.batch_samples import BatchSamples, length_of, settle_labels
from micronet.data.dataset import DataSource, DataSpec
from micronet.data.samples import SampleSplit
from micronet.errors import MicronetError, count
from micronet.models.calling import input_names, takes_names
from micronet.models.device import Inputs
from micronet.models.inputs import describe_inputs, inputs_in, settle_order
from micronet.tasks.task import Task

NAME = "<data in memory>"  # what artifacts record; never a file
BATCH = 64  # samples of a torch Dataset that are read at a time


class LabelledBatch(NamedTuple):
    """The inputs of a batch, tensors of shape (N, ...), and its N labels in any structure; None: no labels."""

    inputs: tuple[Tensor, ...]
    labels: Any


class MemoryData(str):
    """The name of data in memory. It holds them, so it can stand wherever the name of a data set does.

    Args:
        given: A batch, an iterable of batches such as a DataLoader, or a torch Dataset of samples.
    """

    def __new__(cls, given: Any) -> Self:
        """Return the name, whatever the data are."""
        return super().__new__(cls, NAME)

    def __init__(self, given: Any) -> None:
        self._unread, self._read = _each_batch(given), list[Any]()

    def first(self, number: int | None = None) -> list[Any]:
        """Return the first batches, or all, with arrays as tensors; each batch is read only once.

        Raises MicronetError if there are none.
        """
        missing = None if number is None else max(0, number - len(self._read))
        self._read += map(_as_tensors, islice(self._unread, missing))
        if not self._read:
            raise MicronetError(
                "the data in memory have no batches; a generator can be read only once, so pass a list or a DataLoader"
            )
        return self._read[:number]

    @property
    def example(self) -> Any:
        """The first batch, without the labels if they stand beside a tuple or dict of inputs."""
        batch = self.first(1)[0]
        return batch[0] if _is_nested(batch) else batch

    def is_labelled(self, network: nn.Module) -> bool:
        """Return True if the first batch holds more than the inputs of a network."""
        [inputs] = self.inputs(network, 1)
        return _labels(self.first(1)[0], inputs if isinstance(inputs, Inputs) else (inputs,)) is not None

    def inputs(self, network: nn.Module, number: int | None = None) -> list[Any]:
        """Return the inputs alone of the first batches, or all: tensors or ``Inputs``, as ``inputs_in`` does."""
        batches = self.first(number)
        return [inputs_in(network, batch[0] if _is_nested(batch) else batch) for batch in batches]

    def separated(self, network: nn.Module | None, names: Sequence[str | None]) -> list[LabelledBatch]:
        """Return all batches on the CPU, each with its inputs and its labels apart.

        Args:
            network: The network, whose forward says how many of a batch's items are inputs; None: ``names`` do.
            names: The names of its inputs. Without any, the last of several items are the labels.

        Raises:
            MicronetError: Inputs are missing, differ in length or hold NaN, or the labels differ in number.
        """
        found = []
        for number, batch in enumerate(self.first(), 1):
            given = batch[0] if _is_nested(batch) else batch
            inputs = inputs_in(network, given) if network is not None else _inputs_by_name(given, names)
            inputs = tuple(inputs) if isinstance(inputs, Inputs) else (inputs,)
            _check_inputs(inputs, number)
            labels = _labels(batch, inputs)
            if labels is not None:
                items = batch.values() if isinstance(batch, Mapping) else batch
                are_items = isinstance(labels, tuple) and all(labels is not each for each in items)
                labels = settle_labels(labels, len(inputs[0]), number, are_items=are_items)
            found.append(LabelledBatch(*tree_map_only(Tensor, Tensor.cpu, (inputs, labels))))
        return found

    def open(self, task: Task, like: DataSpec, network: nn.Module | None, *, testing: bool) -> tuple[DataSource, Task]:
        """Return the samples as the source of a data set, and the task, which then knows the classes of the labels.

        Args:
            task: What the labels are for.
            like: The spec of the network; without ``network``, its inputs say how many of a batch's items are inputs.
            network: The network, which then takes its inputs in the order of the batches; None: another runtime's, or
                one that is still to be built. The last item of a batch is then the labels.
            testing: Whether all are test samples; otherwise, the validation samples serve as such.

        Raises:
            MicronetError: Batches differ, or inputs or labels are not what the network or the task takes.
        """
        names = None
        if network is not None:
            settle_order(network, self.example)
            names = input_names(network) if takes_names(network) else None
        batches = self.separated(network, [each.get("name") for each in like.inputs or []])
        inputs, labels = zip(*batches, strict=True)
        _check_alike(inputs)
        unlabelled = [number for number, each in enumerate(labels, 1) if each is None]
        if unlabelled and len(unlabelled) < len(labels):
            raise MicronetError(f"batch {unlabelled[0]} of the data in memory has no labels, but others have")
        _check_forms(labels)
        is_labelled = not (unlabelled or task.needs_reference)
        task, targets = task.given(list(labels) if is_labelled else [])
        samples = BatchSamples(inputs, targets if is_labelled else None, names, stacked=task.has_classes)
        whole = SampleSplit(samples, "the data in memory")
        return DataSource(
            train=lambda: whole,
            test=(lambda: whole) if testing else None,
            classes=like.classes,
            is_images=False,
            is_labelled=is_labelled or not task.has_classes,
        ), task


def _labels(batch: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Return what a batch holds beside its inputs: the only such item, a dict or a tuple of several, or None."""
    if isinstance(batch, Mapping):
        rest: Any = {key: each for key, each in batch.items() if not any(each is own for own in inputs)}
        return next(iter(rest.values())) if len(rest) == 1 else rest or None
    if isinstance(batch, (Tensor, Inputs)):
        return None
    rest = tuple(batch[1 if _is_nested(batch) else len(inputs) :])
    return rest[0] if len(rest) == 1 else rest or None


def _inputs_by_name(batch: Any, names: Sequence[str | None]) -> Any:
    """Return the inputs in a batch for a network of these inputs, whose forward is not known."""
    if isinstance(batch, Mapping):
        own = [name for name in names if name in batch] or list(batch)
        if len(own) > 1 and own[0] not in names:
            raise MicronetError(
                f"the network is not in memory, so the order of its inputs is not known ({', '.join(map(str, own))}); "
                "pass batches that are tuples of the inputs and then the labels"
            )
        return Inputs(batch[name] for name in own)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, Inputs):
        return Inputs(batch[: len(names) or max(1, len(batch) - 1)])
    return batch


def _each_batch(given: Any) -> Iterator[Any]:
    """Yield the batches in what the user gave."""
    if isinstance(given, TorchDataset):
        return iter(DataLoader(given, batch_size=BATCH))
    if isinstance(given, Mapping) or hasattr(given, "shape") or _is_one(given):
        return iter([given])
    if not isinstance(given, Iterable):
        raise MicronetError(
            f"data is a {type(given).__name__}; expected the name of a data set, a batch, or batches such as a "
            "DataLoader or a list of (inputs, labels)"
        )
    return iter(given)


def _is_one(given: Any) -> bool:
    """Return True if a tuple is one batch: it ends with a tensor, and all its tensors have the same length."""
    if not isinstance(given, tuple) or not given or not isinstance(given[-1], (Tensor, ndarray)):
        return False
    lengths = {length_of(each) for each in given}
    return len(lengths) == 1 and None not in lengths


def _is_nested(batch: Any) -> bool:
    """Return True if a batch's first item is a tuple or dict of inputs."""
    return isinstance(batch, (tuple, list)) and bool(batch) and isinstance(batch[0], (Mapping, tuple, list))


def _as_tensors(value: Any) -> Any:
    """Return a batch with arrays as tensors, and floats as float32."""
    if isinstance(value, Mapping):
        return {key: _as_tensors(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        kind = Inputs if isinstance(value, Inputs) else list if isinstance(value, list) else tuple
        return kind(map(_as_tensors, value))
    if isinstance(value, ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, Tensor):
        return value.detach().float() if value.is_floating_point() else value.detach()
    return value


def _check_inputs(inputs: tuple[Any, ...], number: int) -> None:
    """Raise MicronetError if a batch's inputs are not tensors, have no or different lengths, or hold NaN."""
    if not all(isinstance(each, Tensor) for each in inputs):
        got = ", ".join(type(each).__name__ for each in inputs)
        raise MicronetError(f"batch {number} of the data in memory has inputs of type {got}; expected tensors")
    lengths = {len(each) if each.dim() else 0 for each in inputs}
    if len(lengths) > 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs)
        raise MicronetError(
            f"batch {number} of the data in memory has inputs of shape {shapes}; expected the same number of samples "
            "along the first axis of each"
        )
    if bad := sum(int(each.isnan().sum()) for each in inputs if each.is_floating_point()):
        raise MicronetError(
            f"batch {number} of the data in memory has {count(bad, 'input value')} that are NaN; remove them"
        )


def _check_alike(batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise MicronetError if the samples of batches differ in shape or type."""
    described = [describe_inputs([each[0] for each in batch]) for batch in batches]
    for number, own in enumerate(described, 1):
        if own != described[0]:
            first, other = (
                " and ".join(f"{each['dtype']} {tuple(each['shape'])}" for each in inputs)
                for inputs in (described[0], own)
            )
            raise MicronetError(
                f"the samples of batch {number} are {other}, but those of batch 1 are {first}; all samples must have "
                "the same shapes and types"
            )


def _check_forms(labels: Sequence[Any]) -> None:
    """Raise MicronetError if one batch has a label per sample, and another has columns."""
    forms = [type(each) for each in labels]
    for number, form in enumerate(forms, 1):
        if {form, forms[0]} == {list, tuple}:
            raise MicronetError(
                f"the labels of batch {number} are a list of one per sample, but those of batch 1 are columns, or the "
                "reverse; pass dicts of columns, or lists of one label per sample, in every batch"
            )
