"""Whether quantized and pruned networks are faster than the float ones beside them, what runs in integers, and why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micronet.core.metrics import EQUAL_DB
from micronet.core.timing import is_slower
from micronet.evaluation.network import Network, integer_layers
from micronet.evaluation.report import Row
from micronet.onnx.integer_words import describe_integers, describe_saturation, slow_cause
from micronet.packed.file_format import read
from micronet.stages.pack_latency import packed_cause
from micronet.stages.quantize_warnings import CONSTANT
from micronet.stages.words import OTHER_WIDTHS, row_labels

BUSY = 3  # an idle machine stays below 1.5
SIMULATED = "torch simulates integer arithmetic in float; run micronet export-onnx for a file that computes in integers"


def describe_speed(rows: Sequence[Row], files: Sequence[Path], networks: Sequence[Network]) -> list[str]:
    """Return lines on the networks of a comparison, those that are slower than a float one first.

    Args:
        rows: What was measured.
        files: The file of each row.
        networks: The network of each row.

    Returns:
        A line for each quantized or pruned network that is slower than the first float network of its runtime or, if
        there is none, than the first float network, with the cause and what helps; then a line for each quantized ONNX
        file with what its runtime computes in integers, and for each network in C with the memory that it needs.
    """
    integers = [integer_layers(network) for network in networks]
    labels = row_labels(rows)
    quantized = [found is not None or "quantize" in row.stages for row, found in zip(rows, integers, strict=True)]
    slower, others = [], []
    for row, name, file, network, found, is_quantized in zip(
        rows, labels, files, networks, integers, quantized, strict=True
    ):
        floats = [other for other, rounds in zip(rows, quantized, strict=True) if not rounds]
        rival = _rival(row, floats if is_quantized else [other for other in floats if "prune" not in other.stages])
        times = ""
        if rival is not None and row.latency_ms is not None and rival.latency_ms is not None:
            other = f"{rival.name} in {rival.runtime}" if rival.runtime != row.runtime else labels[rows.index(rival)]
            times = f"{row.latency_ms:.2f} ms vs. {rival.latency_ms:.2f} ms for {other}"
            if is_slower(row.latency_ms, rival.latency_ms) and (is_quantized or "prune" in row.stages):
                cause = _cause(row, file, found, is_quantized)
                own = name if rival.runtime == row.runtime else f"{row.name} in {row.runtime}"
                slower.append(f"{own} is slower than {other}: {times}; {cause}")
        if found is not None:
            slower += [f"{name}: {line}" for line in describe_saturation(found)]
            first, *rest = describe_integers(found)
            others += [f"{name}: {first}{f'; {times}' if times else ''}", *(f"{name}: {line}" for line in rest)]
        if row is not rows[0] and is_quantized and row.metrics.get("sqnr_db", 0) >= EQUAL_DB:
            others.append(f"{name}: its outputs equal those of {labels[0]} exactly, {CONSTANT}")
        if memory := getattr(network, "memory", None):
            others.append(f"{name}: {memory()}")
    return [*slower, *others]


def describe_noise(rows: Sequence[Row]) -> list[str]:
    """Return a line on the widest spread if the p95 of a latency is more than BUSY times its median, else nothing."""
    spreads = [
        (p95 / median, label, median, p95)
        for row, label in zip(rows, row_labels(rows), strict=True)
        for median, p95 in (
            (row.latency_ms, row.latency_p95_ms),
            (row.latency_batch64_ms, row.latency_batch64_p95_ms),
        )
        if median and p95
    ]
    spread, label, median, p95 = max(spreads, default=(0.0, "", 0.0, 0.0))
    if spread <= BUSY:
        return []
    return [
        f"this machine is busy: the p95 of {label} is {spread:.1f} times its median ({p95:.2f} ms vs. "
        f"{median:.2f} ms); measure again when nothing else runs"
    ]


def _rival(row: Row, floats: list[Row]) -> Row | None:
    """Return the float network to compare with: of the same runtime and, if possible, pruned alike."""
    pruned = "prune" in row.stages
    ranked = sorted(floats, key=lambda each: (each.runtime != row.runtime, ("prune" in each.stages) != pruned))
    return ranked[0] if ranked and ranked[0] is not row else None


def _cause(row: Row, file: Path, integers: dict[str, Any] | None, is_quantized: bool) -> str:
    """Return why a network is slow, and what helps."""
    if row.runtime == "packed":
        return packed_cause(read(file))
    if is_quantized:
        return slow_cause(integers) if integers else SIMULATED
    return OTHER_WIDTHS
