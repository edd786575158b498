"""What a search would try, and about how long that would take, without writing anything."""

import time
from typing import TYPE_CHECKING

from micronet.compression.bits import FEW, STORES_FEW
from micronet.compression.rounds import epoch_seconds, most_epochs
from micronet.compression.sensitivities import noise_of
from micronet.compression.words import describe_resolution
from micronet.core.config import flag
from micronet.errors import count
from micronet.models.device import pick_device
from micronet.pruning.sensitivity import SHARES
from micronet.quantization.config import CALIBRATION_BATCH

if TYPE_CHECKING:
    from micronet.compression.compressing import Compressing
    from micronet.compression.stage import Compress

EXPORT_SECONDS = 10.0  # of a candidate: quantizing, exporting and timing it, in a usual network
LAYER_SECONDS = 0.05  # of timing a layer in all its widths
WIDTHS = 20  # of a layer that the walk times


def outline(search: "Compressing", names: list[str], number: int) -> list[str]:
    """Return lines on the candidates of a search and its minutes.

    Args:
        search: The search.
        names: The candidates that are narrower, in words.
        number: How many these are.
    """
    settings, data, groups, layers = search.settings, search.data, search.groups, search.layers
    start = time.perf_counter()
    noise_of(search.model, search.batches)
    forward = time.perf_counter() - start
    validate = forward * len(data.validation) / max(1, CALIBRATION_BATCH * len(search.batches))
    candidate = EXPORT_SECONDS + validate
    lines = [
        _goal(search),
        f"network: {count(len(layers), 'layer')}, {count(len(groups.widths), 'group')} of channels that may be cut"
        + (f" ({groups.why})" if groups.why else ""),
        _quantized(settings),
    ]
    metric, noun = settings.metric or data.task.main, data.validation.noun
    lines += describe_resolution(settings.goal.max_drop, noun, len(data.validation), metric)
    seconds = 3 * candidate
    if names:
        lines.append(f"narrower: {', '.join(names)}")
        seconds += len(SHARES) * len(groups.widths) * forward
    if settings.quantity == "latency":
        seconds += LAYER_SECONDS * WIDTHS * len(layers)
    if settings.no_training:
        seconds += number * candidate
        lines.append("nothing is trained")
    elif names:
        epoch = epoch_seconds(search.model, data, pick_device(settings.device))
        most = most_epochs(len(data.train))
        later = "".join(f", then the better half of these for up to {epochs} more" for epochs in most[1:])
        lines.append(
            f"trained: all for up to {most[0]} epochs of {_spell(epoch)}{later}, within the budget; int8 too "
            "if it loses more than half of the drop"
        )
        seconds += sum(number / 2**index * (candidate + epochs * epoch) for index, epochs in enumerate(most))
    budget = settings.budget_seconds / 60
    lines.append(f"about {seconds / 60:.0f} minutes for all; the budget is {budget:g}")
    if seconds > settings.budget_seconds:
        lines.append("what does not fit is left out")
    return lines


def _spell(seconds: float) -> str:
    return f"{seconds:.2g} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"


def _goal(search: "Compressing") -> str:
    """Return what is wanted, and what it may cost."""
    settings, data = search.settings, search.data
    first = next(iter(settings.goals), None)
    wanted = f"{flag(first)} {getattr(settings, first)}" if first else "--minimize latency"
    return (
        f"goal: {wanted} in {settings.runtime}, a drop of at most {settings.max_drop:g} points of "
        f"{settings.metric or data.task.main} on {count(len(data.validation), f'validation {data.validation.noun}')}"
    )


def _quantized(settings: "Compress") -> str:
    """Return what is tried in bits."""
    faster = ", with the layers in float that are faster so" if settings.quantity == "latency" else ""
    few = settings.quantity == "size" and settings.runtime in STORES_FEW
    return (
        f"quantized: int8{faster}, and if int8 loses more than that, with the most sensitive layers in float"
        f"{f'; {FEW} bits in some or all layers' if few else ''}; those that lose something also with learned rounding"
    )
