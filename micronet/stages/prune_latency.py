"""How fast networks are in ONNX Runtime: a pruned one beside the whole one and one of widths in multiples of 8."""

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact
from micronet.core.progress import Progress
from micronet.errors import first_line
from micronet.evaluation.latency import time_calls
from micronet.evaluation.network import Predictor
from micronet.models.device import Example, Inputs, as_arrays, head
from micronet.onnx.config import ExportConfig
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import Pruner
from micronet.pruning.traced_network import TracedNetwork
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor

MULTIPLE = 8  # channels that kernels compute at a time
OPSET = 20  # the newest that torch's older exporter knows
SECONDS = 0.3  # that each network is timed


def in_onnxruntime(network: Artifact, example: Example) -> Predictor:
    """Return a network in ONNX Runtime, with one thread, for a batch of one.

    Torch's older exporter needs a tenth of the time of the one that ``to_onnx`` uses, and ONNX Runtime is as fast on
    what it writes. What it cannot export, the other one may; with several inputs, that needs a free batch axis.
    """
    batch = _first(example)
    try:
        model = _traced(network.model, batch if isinstance(batch, Inputs) else (batch,))
    except Exception:  # it raises whatever the user's code does, and errors of many kinds of its own
        from micronet.onnx.export import to_onnx

        config = ExportConfig(dynamic="batch" if isinstance(batch, Inputs) else "none")
        model = to_onnx(network, batch, config).SerializeToString()
    return session_predictor(model, RuntimeOptions(threads=1))


def _traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """Export a network by running it once."""
    plain = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), _unprinted_graphs(), torch.no_grad():
        torch.onnx.export(plain, inputs, file, dynamo=False, opset_version=OPSET)  # type: ignore[arg-type]
    return file.getvalue()


@contextmanager
def _unprinted_graphs() -> Iterator[None]:
    """Keep torch from printing the graph of a failed export to standard output; it has no setting for that."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def time_predictors(predictors: Sequence[Predictor], example: Example) -> list[float]:
    """Return the milliseconds of each predictor's fastest call for a batch of one; they run in turns.

    Medians of so few calls would compare the other work of a busy machine.
    """
    calls = time_calls(predictors, [as_arrays(_first(example))] * len(predictors), SECONDS, one_thread=True)
    return [round(1000 * min(own), 4) for own in calls]


def measure_latency(
    whole: Artifact, pruned: Artifact, config: PruneConfig, example: Example, traced: TracedNetwork, progress: Progress
) -> dict[str, Any]:
    """Time a network before and after pruning, and pruned to multiples of 8 if that gives another one.

    Args:
        whole: The network before pruning.
        pruned: The pruned one.
        config: How it was pruned.
        example: An input batch, or a tuple of several inputs.
        traced: The network before pruning, as it was traced for that.
        progress: Where to report progress; exporting takes seconds, and minutes for long sequences.

    Returns:
        ``before_ms``, ``after_ms`` and perhaps ``regular_8_ms``; or ``skipped``: why nothing was measured. Never raises
        an exception of its own.
    """
    try:
        networks = {"before_ms": whole, "after_ms": pruned}
        regular = _regular(whole.model, config, example, traced)
        if regular is not None and _shapes(regular) != _shapes(pruned.model):
            networks["regular_8_ms"] = replace(whole, model=regular)
        predictors = []
        for done, each in enumerate(networks.values()):
            progress.step("exporting to time in ONNX Runtime", done, len(networks))
            predictors.append(in_onnxruntime(each, example))
        timed = time_predictors(predictors, example)
    except Exception as error:  # a courtesy: whatever an exporter or a runtime raises must not spoil the pruning
        return {"skipped": first_line(error)}
    return dict(zip(networks, timed, strict=True))


def _first(example: Example) -> Any:
    return head(example if isinstance(example, Tensor) else Inputs(example), 1)


def _regular(model: nn.Module, config: PruneConfig, example: Example, traced: TracedNetwork) -> nn.Module | None:
    """Prune a network by the same share, to widths in multiples of 8; return None if the settings rule that out."""
    if config.regular % MULTIPLE == 0 or config.widths is not None or config.target is not None:
        return None
    if config.criterion == "taylor":  # the gradients are gone
        return None
    pruner = Pruner(model, replace(config, regular=MULTIPLE), example, traced=traced)
    return pruner.cut(pruner.planner.plan(config.share))[0]


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]
