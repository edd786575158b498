"""How fast a pruned network is in ONNX Runtime, beside the whole one and beside one of widths in multiples of 8."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from micronet.artifact.artifact import Artifact
from micronet.errors import first_line
from micronet.evaluation.latency import latencies
from micronet.models.device import Example, Inputs
from micronet.onnx.export import to_onnx
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import Pruner
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.stages import prune

MULTIPLE = 8  # channels that kernels compute at a time


def measure_latency(whole: Artifact, pruned: Artifact, config: PruneConfig, example: Example) -> dict[str, Any]:
    """Time networks in ONNX Runtime with one thread and a batch of one, in turns.

    Args:
        whole: The network before pruning.
        pruned: The pruned one.
        config: How it was pruned.
        example: An input batch, or a tuple of several inputs.

    Returns:
        ``before_ms`` and ``after_ms``, medians; ``regular_8_ms``, if ``--regular 8`` gives another network; or
        ``skipped``: why nothing was measured. Never raises an exception of its own.
    """
    params = sum(parameter.numel() for parameter in whole.model.parameters())
    if params > prune.LARGEST_TIMED:
        return {"skipped": f"more than {prune.LARGEST_TIMED:,} parameters"}
    try:
        networks = {"before_ms": whole, "after_ms": pruned}
        if (regular := _regular(whole, config, example)) is not None:
            networks["regular_8_ms"] = regular
        batch = example if isinstance(example, Tensor) else Inputs(example)
        first: Any = tree_map(lambda x: x[:1].numpy(), tuple(batch) if isinstance(batch, Inputs) else batch)
        predictors = [
            session_predictor(to_onnx(each, batch).SerializeToString(), RuntimeOptions(threads=1))
            for each in networks.values()
        ]
        timed = latencies(predictors, [first] * len(predictors))
    except Exception as error:  # a courtesy: whatever an exporter or a runtime raises must not spoil the pruning
        return {"skipped": first_line(error)}
    return {name: round(latency.p50_ms, 4) for name, latency in zip(networks, timed, strict=True)}


def _regular(whole: Artifact, config: PruneConfig, example: Example) -> Artifact | None:
    """Return the network pruned by the same share to multiples of 8, or None if that is not another network."""
    if config.regular % MULTIPLE == 0 or config.widths is not None or config.target is not None:
        return None
    if config.criterion == "taylor":  # the gradients are gone
        return None
    pruner = Pruner(whole.model, replace(config, regular=MULTIPLE), example)
    return replace(whole, model=pruner.cut(pruner.planner.plan(config.share))[0])
