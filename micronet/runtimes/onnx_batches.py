"""Run a batch of any size through an ONNX Runtime session, whatever size its model takes at once."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError, count, first_line

KINDS = {
    "float": "float32",
    "double": "float64",
}  # by ONNX Runtime's names; the others are the same
INTEGERS = "iu"  # numpy's kinds
_AXES = re.compile(r"index: (\d+) Got: (\d+) Expected: (\d+)")
_CODES = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def run_batch(session: Any, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return a session's outputs for a batch, one array (N, ...) for each input, in the order of the model's.

    A fixed batch size takes several calls, the last one filled up with its last sample. If an array has one more axis
    than its input, which then has no batch, each sample takes a call. Integers and floats become those that the model
    takes. Raises MicronetError if the model takes other inputs.
    """
    entries = session.get_inputs()
    inputs = _fitted(entries, arrays)
    fixed = {entry.shape[0] for entry in entries if entry.shape and isinstance(entry.shape[0], int)}
    total = len(inputs[0])
    stacked = any(_is_stacked(entry, x) for entry, x in zip(entries, inputs, strict=True))
    size = 1 if stacked else fixed.pop() if len(fixed) == 1 else total
    calls = []
    for start in range(0, total, size):
        rows = min(size, total - start)
        feed = {
            entry.name: np.asarray(x[start]) if _is_stacked(entry, x) else _filled(x[start : start + size], size)
            for entry, x in zip(entries, inputs, strict=True)
        }
        try:
            outs = session.run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise MicronetError(f"ONNX Runtime rejected {_described(arrays)}: {reason(error)}") from error
        # Only outputs with one row per sample are cut: inner tensors may hold windows, or nothing per sample.
        calls.append([out[:rows] if out.ndim and len(out) == size else out for out in outs])
    if len(calls) == 1:
        return calls[0]
    return [np.concatenate(outs) if outs[0].ndim else np.stack(outs) for outs in zip(*calls, strict=True)]


def reason(error: Exception) -> str:
    """Return what an exception of ONNX Runtime says, without codes and places in its source."""
    text = _CODES.sub("", first_line(error).rpartition("Status Message: ")[2])
    if axes := _AXES.findall(str(error)):
        found = " and ".join(f"axis {axis} has {have} entries instead of {want}" for axis, have, want in axes)
        text = f"{text.removesuffix(' for the following indices')}: {found}"
    return text


def _fitted(entries: Sequence[Any], arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the arrays in the types of a model's inputs; raise MicronetError if they are of another kind or shape."""
    fitted = list(_converted(entries, arrays)) if len(entries) == len(arrays) else []
    if len(fitted) < len(entries):
        wanted = ", ".join(f"{entry.name} {_dtype(entry)} {_sizes(entry.shape[1:])}" for entry in entries)
        raise MicronetError(
            f"the model takes {count(len(entries), 'input')} ({wanted}), but the data set has {_described(arrays)}; "
            "pass other data with --data, or export the model for these"
        )
    return fitted


def _converted(entries: Sequence[Any], arrays: Sequence[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Yield the arrays that fit, each in its input's type."""
    for entry, x in zip(entries, arrays, strict=True):
        try:
            kind = np.dtype(_dtype(entry))
        except TypeError:  # strings, and types that numpy does not have
            continue
        same = kind.kind == x.dtype.kind or (kind.kind in INTEGERS and x.dtype.kind in INTEGERS)
        stacked = _is_stacked(entry, x)
        sizes = zip(entry.shape if stacked else entry.shape[1:], x.shape[1:], strict=False)
        if same and (stacked or len(entry.shape) == x.ndim) and all(not isinstance(a, int) or a == b for a, b in sizes):
            yield np.ascontiguousarray(x, kind)


def _is_stacked(entry: Any, x: NDArray[Any]) -> bool:
    """Return True for an array that holds a whole input for each sample."""
    return bool(x.ndim == len(entry.shape) + 1)


def _filled(part: NDArray[Any], size: int) -> NDArray[Any]:
    return np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) if len(part) < size else part


def _dtype(entry: Any) -> str:
    """Return numpy's name for the type of an input, such as ``tensor(float)``."""
    name = str(entry.type).removeprefix("tensor(").removesuffix(")")
    return KINDS.get(name, name)


def _described(arrays: Sequence[NDArray[Any]]) -> str:
    return ", ".join(f"{x.dtype} {_sizes(x.shape[1:])}" for x in arrays)


def _sizes(shape: Sequence[Any]) -> str:
    """Return sizes such as 3x?x?, without the batch."""
    return "x".join(str(size) if isinstance(size, int) else "?" for size in shape) or "scalars"
