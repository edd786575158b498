"""Arrays from a file as the inputs of an ONNX model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.data.labelled_names import input_arrays
from micronet.data.npz import Header, read_headers, read_npz
from micronet.errors import MicronetError
from micronet.onnx.feeds import Feed, Input, batched


def read_arrays(path: Path, inputs: Sequence[Input]) -> list[Feed]:
    """Read raw inputs from an ``.npz`` file, in batches of the size that a model takes.

    Arrays belong to inputs by their names or, if none has an input's name, by their order; of a data set with labels,
    those for training do. An array with one more axis than its input holds one input per run. Otherwise its rows are
    split into runs, unless they are as many as one run takes, which then all get. Rows of an input without a fixed
    batch size are split as those of another, if they are equally many.

    Raises:
        MicronetError: The file is damaged, or its arrays do not fit the inputs or hold NaN or infinity; masks may hold
            -infinity.
    """
    headers = read_headers(path)
    stored = input_arrays(headers)
    names = match_arrays(str(path), {name: headers[array] for name, array in stored.items()}, inputs)
    read = read_npz(path)
    arrays = {name: read[array] for name, array in stored.items()}
    stacked = any(arrays[names[entry.name]].ndim > len(entry.shape) for entry in inputs)
    steps: dict[int, int] = {}  # a number of rows -> how many of them a run gets
    for entry in inputs:
        values = arrays[names[entry.name]]
        if own := 1 if values.ndim > len(entry.shape) else (entry.shape or (None,))[0]:
            steps.setdefault(len(values), own)
    runs: dict[str, list[NDArray[Any]]] = {}
    for entry in inputs:
        values = arrays[names[entry.name]].astype(entry.dtype, copy=False)
        if values.ndim > len(entry.shape):
            runs[entry.name] = [np.asarray(each) for each in values]  # of scalars too
        elif entry.shape[:1] == (None,) and len(values) in steps:
            runs[entry.name] = list(batched(replace(entry, shape=(steps[len(values)], *entry.shape[1:])), values))
        else:
            whole = not values.ndim or (stacked and entry.shape[0] in (None, len(values)))
            runs[entry.name] = [values] if whole else list(batched(entry, values))
    feeds = _joined(str(path), runs)
    _check_values(str(path), feeds, names)
    return feeds


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
        samples = ", ".join(["samples", *("?" if size is None else str(size) for size in entry.shape[1:])])
        found.append(f"{name} has shape {shape}, but the model takes {takes}; save it as ({samples})")
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


def _joined(source: str, runs: Mapping[str, Sequence[NDArray[Any]]]) -> list[Feed]:
    """Return one feed per run; an input with a single run serves all."""
    count = max(map(len, runs.values()))
    if any(len(own) not in (1, count) for own in runs.values()):
        listed = ", ".join(f"{len(own)} of {name}" for name, own in runs.items())
        raise MicronetError(
            f"{source}: the model's batch sizes split the arrays into unequal numbers of runs ({listed}); save them "
            "with one more axis, one entry per run"
        )
    return [{name: own[index if len(own) > 1 else 0] for name, own in runs.items()} for index in range(count)]


def _check_values(source: str, feeds: Iterable[Feed], names: Mapping[str, str]) -> None:
    """Raise MicronetError that names an array with NaN or infinity; -infinity, as in masks, passes."""
    for feed in feeds:
        for name, values in feed.items():
            if values.dtype.kind == "f" and not (np.isfinite(values) | np.isneginf(values)).all():
                what = "NaN" if np.isnan(values).any() else "infinity"
                raise MicronetError(f"{source}: {names[name]} contains {what}; remove it")
