"""What ONNX files are run on, and how close a quantized one's outputs are to those of the float file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from micronet.data.arrays import LABELLED
from micronet.data.memory import MemoryData
from micronet.data.npz import Header, names_in, read_headers
from micronet.errors import MicronetError
from micronet.models.finite import check_outputs
from micronet.onnx.feeds import Feed, Input, batched, read_arrays
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session
from micronet.tasks.agreement import Similarity


def compare_files(floating: onnx.ModelProto, int8: onnx.ModelProto, feeds: Iterable[Feed]) -> dict[str, float]:
    """Return the figures of ``Similarity`` over a quantized model's outputs; infinities that both give are equal.

    Raises FailedError if an output of the float model holds NaN, or an infinity that the quantized one does not give.
    """
    similarity, sessions = Similarity(), open_files(floating, int8)
    for feed in feeds:
        pairs = list(zip(*(session.run(None, feed) for session in sessions), strict=True))
        reference, ours = zip(*(_finite(*pair) for pair in pairs), strict=True)
        check_outputs(reference, "the float model")
        similarity.update(list(ours), list(reference))
    return similarity.compute()


def open_files(*models: onnx.ModelProto) -> list[Any]:
    """Open a session of ONNX Runtime for each model."""
    return [open_session(each.SerializeToString(), RuntimeOptions(), "the model") for each in models]


def is_raw(named: str) -> bool:
    """Return True for inputs in memory or in an .npz file, False for labelled images for training and testing."""
    if isinstance(named, MemoryData):
        return True
    path = Path(named)
    return path.suffix == ".npz" and path.exists() and not names_in(path) >= LABELLED


def raw_feeds(named: str, inputs: Sequence[Input]) -> list[Feed]:
    """Return the runs of a model on inputs in memory or in an .npz file, in batches of the size that it takes.

    Raises MicronetError if they do not fit the model's inputs, or hold NaN or infinity; masks may hold -infinity.
    """
    if not isinstance(named, MemoryData):
        names = match_arrays(named, read_headers(Path(named)), inputs)
        feeds = read_arrays(Path(named), inputs)
        _check_values(named, feeds, names)
        return feeds
    found: list[Feed] = []
    for batch in named.separated(None, [each.name for each in inputs]):
        for each, values in zip(inputs, batch.inputs, strict=True):
            fixed = zip(values.shape[1:], each.shape[1:], strict=True) if values.dim() == len(each.shape) else [(0, 1)]
            if any(want not in (None, have) for have, want in fixed):
                raise MicronetError(f"a batch has an input of shape {tuple(values.shape)}, but the model takes {each}")
        arrays = [values.cpu().numpy().astype(each.dtype) for each, values in zip(inputs, batch.inputs, strict=True)]
        for parts in zip(*(batched(each, values) for each, values in zip(inputs, arrays, strict=True)), strict=True):
            found.append({each.name: part for each, part in zip(inputs, parts, strict=True)})
    return found


def match_arrays(source: str, arrays: Mapping[str, Header], inputs: Sequence[Input]) -> dict[str, str]:
    """Return the array for each input of a model, by its name or else, if none has an input's name, by its order.

    Raises MicronetError that names every array that is missing or does not fit; ``source``: what holds them.
    """
    names = [entry.name for entry in inputs]
    by_order = len(arrays) == len(inputs) and not arrays.keys() & {*names}
    matched = dict(zip(names, arrays if by_order else names, strict=True))
    wrong = [f"it has no array for {entry}" for entry in inputs if matched[entry.name] not in arrays]
    if unused := [name for name in arrays if name not in matched.values()]:
        wrong.append(f"the model has no input {' or '.join(unused)}")
    if wrong:
        raise MicronetError(f"{source}: {'; '.join(wrong)}; save one array for each input")
    pairs = [(matched[entry.name], entry, arrays[matched[entry.name]]) for entry in inputs]
    wrong = [words for name, entry, header in pairs for words in _misfits(name, entry, header)]
    if wrong := wrong or _unequal(pairs):
        raise MicronetError(f"{source}: {'; '.join(wrong)}")
    return matched


def _misfits(name: str, entry: Input, header: Header) -> list[str]:
    """Return what is wrong with an array's type and shape for an input."""
    shape, dtype = header
    found = []
    if dtype != entry.dtype and not (dtype.kind == entry.dtype.kind in "fiu"):
        found.append(f"{name} is {dtype}; save it as {entry.dtype}")
    extra = len(shape) - len(entry.shape)
    free = 0 if extra or not shape else 1  # the rows of a batch are split as the model takes them
    own = zip(shape[max(0, extra) + free :], entry.shape[free:], strict=False)
    if extra not in (0, 1) or any(want not in (None, have) for have, want in own):
        takes = str(entry).partition(f"{entry.dtype} ")[2]
        found.append(f"{name} has shape {shape}, but the model takes {takes}")
    elif 0 in shape:
        found.append(f"{name} has shape {shape}, so it is empty; save at least one sample")
    return found


def _unequal(pairs: Sequence[tuple[str, Input, Header]]) -> list[str]:
    """Return what is wrong with the lengths of arrays, if anything.

    Those of one row, of inputs without a batch axis, and beside stacked runs those of a single one, serve all runs.
    """
    stacked = {name: header.shape[0] for name, entry, header in pairs if len(header.shape) > len(entry.shape)}
    batches = {name: header.shape[0] for name, entry, header in pairs if entry.shape[:1] not in ((), header.shape[:1])}
    lengths = {name: length for name, length in (stacked or batches).items() if length > 1}
    if len({*lengths.values()}) < 2:
        return []
    listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
    return [f"the arrays differ in their number of samples: {listed}; save as many in each"]


def _check_values(source: str, feeds: Iterable[Feed], names: Mapping[str, str]) -> None:
    """Raise MicronetError that names an array with NaN or infinity; -infinity, as in masks, passes."""
    for feed in feeds:
        for name, values in feed.items():
            if values.dtype.kind == "f" and not (np.isfinite(values) | np.isneginf(values)).all():
                what = "NaN" if np.isnan(values).any() else "infinity"
                raise MicronetError(f"{source}: {names[name]} contains {what}; remove it")


def _finite(reference: NDArray[Any], ours: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two arrays as tensors, with zeros where both hold the same infinity."""
    same = np.isinf(reference) & (reference == ours)
    return tuple(torch.from_numpy(np.where(same, 0, each)) for each in (reference, ours))  # type: ignore[return-value]
