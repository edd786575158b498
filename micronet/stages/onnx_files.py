"""What ONNX files are run on, and how close a quantized one's outputs are to those of the float file."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from micronet.data.labelled_arrays import holds_images
from micronet.data.memory import MemoryData
from micronet.data.npz import read_headers
from micronet.errors import MicronetError
from micronet.models.finite import check_outputs
from micronet.onnx.arrays import read_arrays
from micronet.onnx.feeds import Feed, Input, batched
from micronet.onnx.sessions import run_feed
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session
from micronet.tasks.agreement import Similarity


def compare_files(floating: onnx.ModelProto, int8: onnx.ModelProto, feeds: Iterable[Feed]) -> dict[str, float]:
    """Return the figures of ``Similarity`` over a quantized model's outputs; infinities that both give are equal.

    Raises FailedError if an output of the float model holds NaN, or an infinity that the quantized one does not give.
    """
    similarity, sessions = Similarity(), open_files(floating, int8)
    for feed in feeds:
        pairs = list(zip(*(run_feed(session, feed) for session in sessions), strict=True))
        reference, ours = zip(*(_finite(*pair) for pair in pairs), strict=True)
        check_outputs(reference, "the float model")
        similarity.update(list(ours), list(reference))
    return similarity.compute()


def closeness(found: dict[str, float]) -> str:
    """Return the main figure of ``compare_files`` as text."""
    if "sqnr_db" in found:
        return f"SQNR {found['sqnr_db']:.1f} dB"
    return f"{found['equal_labels']:.1%} of the labels equal"


def open_files(*models: onnx.ModelProto) -> list[Any]:
    """Open a session of ONNX Runtime for each model."""
    return [open_session(each.SerializeToString(), RuntimeOptions(), "the model") for each in models]


def is_raw(named: str) -> bool:
    """Return True for inputs in memory or in an .npz file, False for images with labels in one."""
    if isinstance(named, MemoryData):
        return True
    path = Path(named)
    return path.suffix == ".npz" and path.exists() and not holds_images(path)


def raw_feeds(named: str, inputs: Sequence[Input]) -> list[Feed]:
    """Return the runs of a model on inputs in memory or in an .npz file, in batches of the size that it takes.

    Raises MicronetError if they do not fit the model's inputs, or hold NaN or infinity; masks may hold -infinity.
    """
    if not isinstance(named, MemoryData):
        return read_arrays(Path(named), inputs)
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


def count_rows(named: str | Path | None) -> float:
    """Return the rows of the longest array in an .npz file, of which a fixed batch repeats some, or infinity."""
    if named is None or isinstance(named, MemoryData) or not is_raw(str(named)):
        return math.inf
    return max((header.shape[0] for header in read_headers(Path(named)).values() if header.shape), default=math.inf)


def _finite(reference: NDArray[Any], ours: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two arrays as tensors, with zeros where both hold the same infinity."""
    same = np.isinf(reference) & (reference == ours)
    return tuple(torch.from_numpy(np.where(same, 0, each)) for each in (reference, ours))  # type: ignore[return-value]
