"""What ``quantize`` warns of: an untraced network, fixed sizes, constant inputs, and outputs far from float's."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from micronet.artifact.header import StageRecord
from micronet.core.metrics import EQUAL_DB
from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.graph.agreement import follows_sizes
from micronet.graph.record import describe_example, record_network
from micronet.graph.trace import plain_network, trace_modes
from micronet.models.device import Example, as_inputs
from micronet.models.inputs import make_inputs
from micronet.models.modes import copy_model
from micronet.stages.words import describe_inputs

CONSTANT = "as constants such as zeros do, so that SQNR says nothing, unless they are class numbers"
FIXED_SIZES = (
    "fixed_sizes"  # in a record's result, of a stage after which no other sizes of inputs are computed rightly
)
POOR_DB = 10  # an SQNR below it means errors of a third of the outputs' size or more


def warn_untraced(model: nn.Module, example: Example | None, progress: Progress) -> bool:
    """Say why a network cannot be traced, and what follows; return True if so."""
    if example is None or trace_modes(model) is not None:
        return False
    inputs = as_inputs(model, example)
    try:
        for given in (inputs, make_inputs(describe_example(inputs))):  # a restored network is recorded on the latter
            record_network(copy_model(model), given)
    except MicronetError as error:
        progress.line(
            f"warning: {error}; as it is, only the weights and the inputs of its layers are quantized, and the network "
            "may be refused by export-onnx"
        )
        return True
    return False


def warn_fixed_sizes(model: nn.Module, record: StageRecord, example: Example | None, progress: Progress) -> None:
    """Say and record if a stage fixed sizes that its network's forward computes with, as a loop over time steps does.

    Args:
        model: The network before the stage.
        record: The stage.
        example: An input.
        progress: Where to say it.
    """
    recorded = record.result.get("recorded")
    if not recorded or example is None:
        return
    inputs = as_inputs(model, example)
    if not follows_sizes(model, plain_network(copy_model(model), recorded), inputs):
        record.result[FIXED_SIZES] = True
        sizes = describe_inputs([{**each, "shape": each["shape"][1:]} for each in describe_example(inputs)])
        progress.line(
            f"warning: the sizes of the inputs are fixed from now on ({sizes}), because forward() loops over them, or "
            "computes with them in a way that cannot be traced; for others, the results are wrong"
        )


def warn_constant(batches: Iterable[Any], progress: Progress) -> None:
    """Say so if calibration inputs, tensors or arrays or tuples of them, are the same in every sample."""
    first, samples = list[Any](), 0
    for batch in batches:  # usually, the first one shows that samples differ
        given = batch if isinstance(batch, tuple) else (batch,)
        first = first or [x[:1] if x.ndim else x for x in given]
        for x, own in zip(given, first, strict=True):
            if x.shape[1:] != own.shape[1:] or not bool((x == own).all()):
                return
        samples += len(given[0]) if given[0].ndim else 1
    if first and all(bool((x == x.reshape(-1)[:1]).all()) for x in first):
        what = "the calibration inputs hold one value only"
    elif samples > 1:
        what = f"all {samples} calibration samples are the same"
    else:
        return
    progress.line(
        f"warning: {what}; ranges set from them may be wrong for other inputs, so pass varied ones with --data or "
        "--calib-data"
    )


def warn_poor(metrics: Mapping[str, object], mode: str, progress: Progress) -> None:
    """Say so if the outputs of a network without training are far from the float network's, and what may help."""
    sqnr = metrics.get("test_sqnr_db")
    if mode == "ptq" and isinstance(sqnr, float) and sqnr >= EQUAL_DB:
        progress.line(
            f"warning: the outputs equal the float network's exactly, {CONSTANT}; check that its weights were loaded "
            "(import --weights)"
        )
    if mode == "ptq" and isinstance(sqnr, float) and sqnr < POOR_DB:
        progress.line(
            f"warning: the outputs are far from the float network's (SQNR {sqnr:.1f} dB); train with --mode qat, "
            "keep more bits (--a-bits 16) or float layers (--exclude), or quantize the ONNX file of the float network, "
            "in which more values between layers stay in float"
        )
