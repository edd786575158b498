"""How close a quantized ONNX file's outputs are to those of the float file."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from micronet.models.finite import check_outputs
from micronet.onnx.feeds import Feed
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


def _finite(reference: NDArray[Any], ours: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two arrays as tensors, with zeros where both hold the same infinity."""
    same = np.isinf(reference) & (reference == ours)
    return tuple(torch.from_numpy(np.where(same, 0, each)) for each in (reference, ours))  # type: ignore[return-value]
