"""What was given up where, in words."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from micronet.compression.goal import SAME_SIZE, UNITS, Goal
from micronet.compression.point import TOLERANCE, Point, spell_drop, spell_enough, spell_error
from micronet.core.machine import usable_cores
from micronet.core.timing import NOISE
from micronet.errors import count, listed
from micronet.quantization.config import INTEGER_BITS

LISTED = 4
ERRORS = 2  # standard errors by which an accuracy must exceed that of chance
SHARES_OF_SAMPLES = ("accuracy",)
Times = Mapping[str, tuple[float | None, float | None]]  # layer -> milliseconds in float and in integers
Alone = Mapping[str, Mapping[str, float]]  # layer -> the noise and the drop if it alone is quantized


def describe_choice(
    point: Point,
    groups: Sequence[tuple[str, int]],
    alone: Mapping[int, Alone],
    times: Times,
) -> list[str]:
    """Return lines on what the chosen candidate gave up.

    Args:
        point: The candidate.
        groups: The groups of channels that may be cut: the first layer, and the width before.
        alone: By bits, what each layer costs if it alone has so few (see ``bits_noise``), as far as that was measured.
        times: Of each layer that stays float because it is slower in integers.
    """
    plan, lines = point.plan, []
    if not plan.widths and plan.is_float:
        return ["nothing was given up: the original is the best that was found"]
    cut = [(name, old, new) for (name, old), new in zip(groups, plan.widths, strict=False) if new < old]
    if cut:
        cut.sort(key=lambda each: each[2] / each[1])
        most = listed([f"{name} {old} -> {new}" for name, old, new in cut], LISTED)
        kept = [name for (name, old), new in zip(groups, plan.widths, strict=False) if new == old]
        whole = f"; whole: {listed(kept, LISTED)}" if kept else ""
        are = "is" if len(cut) == 1 else "are"
        lines.append(f"{len(cut)} of {count(len(groups), 'group')} of channels {are} narrower: {most}{whole}")
    if not plan.is_float:
        how = "trained (QAT)" if plan.trained_bits else "calibrated (PTQ)"
        rounding = ", rounding learned" if plan.learned_rounding else ""
        lines.append(f"weights have {plan.bits} bits, {how}{rounding}")
    lines += [_why_float(name, alone.get(INTEGER_BITS, {}), times) for name in plan.floats[:LISTED]]
    lines += _more(len(plan.floats), "stay", "float")
    few = alone.get(plan.bits, {}) if isinstance(plan.bits, int) else {}
    for name in [name for name in plan.wide if name in few][:LISTED]:
        lines.append(f"{name} keeps 8 bits: alone it costs {100 * few[name]['drop']:.2f} points at {plan.bits}")
    return lines + _more(len(plan.wide), "keep", "8 bits")


def _more(number: int, verb: str, what: str) -> list[str]:
    """Return a line on the layers that were not listed, if there are any."""
    more = number - LISTED
    return [f"{count(more, 'more layer')} {verb}{'s' if more == 1 else ''} {what}"] if more > 0 else []


def _why_float(name: str, alone: Alone, times: Times) -> str:
    if name in times:
        floats, integers = times[name]
        if floats is None or integers is None:
            return f"{name} stays float: it is slower in integers"
        return f"{name} stays float: alone it takes {integers:.3f} ms in integers, {floats:.3f} ms in float"
    if name in alone and "drop" in alone[name]:
        return f"{name} stays float: in integers alone it costs {100 * alone[name]['drop']:.2f} points"
    if name in alone:
        return f"{name} stays float: in integers alone it changes the outputs by {alone[name]['error']:.2%}"
    return f"{name} stays float"


def describe_floats(found: Mapping[str, str], chosen: Collection[str]) -> list[str]:
    """Return lines on the layers that run in float though nobody chose that, by the reason.

    ``found``: layer -> reason. ``chosen``: the layers that were to stay float.
    """
    reasons: dict[str, list[str]] = {}
    for name, why in found.items():
        if name not in chosen:
            reasons.setdefault(why, []).append(name)
    return [f"in float: {listed(names, LISTED)} ({why})" for why, names in reasons.items()]


def describe_int8(int8: Point, original: Point) -> str:
    """Return why weights stay float."""
    if int8.failed:
        return f"weights stay float: int8 cannot be made ({int8.failed})"
    shares = [f"{share:.2f} of the {noun}" for noun, share in _shares(int8, original).items()]
    return f"weights stay float: int8 alone has {' and '.join(shares)}, and a drop of {spell_drop(int8)}"


def describe_threads(threads: int) -> list[str]:
    """Return a warning if the runtime is to use more threads than there are cores."""
    cores = usable_cores()
    if threads <= cores:
        return []
    return [
        f"warning: --threads {threads} is more than the {count(cores, 'usable core')} of this machine, so the "
        "latencies say little of one that has them"
    ]


def describe_limit(limit: int | None, recorded: int | None, stages: Collection[str]) -> list[str]:
    """Return a warning if the samples are not those of the training; ``stages``: the network's history."""
    if limit in (None, recorded) or not set(stages) - {"import"}:
        return []
    return [
        "warning: --limit is not that of the training, so some validation images may be ones that the network was "
        "trained on, and drops too large or too small"
    ]


def resolution_of(samples: int, metric: str) -> float:
    """Return the drop that one sample makes, 0..1; 0 if the metric is not a share of samples."""
    return 1 / samples if metric in SHARES_OF_SAMPLES else 0.0


def describe_chance(accuracy: float | None, classes: int, samples: int, split: str) -> list[str]:
    """Return a warning if the original's accuracy on a split is that of chance, errors of sampling apart."""
    if accuracy is None or classes < 2:
        return []
    chance = 1 / classes
    if accuracy > chance + ERRORS * math.sqrt(chance * (1 - chance) / samples):
        return []
    return [
        f"warning: the original's {split} accuracy is {accuracy:.1%} for {classes} classes, as by chance, so that "
        "the drops say nothing; train it first, or check the data and the order of the classes"
    ]


def describe_losses(point: Point, original: Point) -> list[str]:
    """Return a warning if the chosen candidate is slower or larger than the original."""
    limits = {"latency": ("slower", NOISE), "size": ("larger", SAME_SIZE)}
    found = [(noun, share, *limits[noun]) for noun, share in _shares(point, original).items()]
    return [
        f"warning: {word} than the original: {share:.2f} of its {noun}"
        for noun, share, word, most in found
        if share > most
    ]


def _shares(point: Point, original: Point) -> dict[str, float]:
    """Return the fractions of the original's latency, if it was measured, and of its size."""
    shares = {"size": point.size_bytes / original.size_bytes}
    if point.latency_ms and original.latency_ms:
        return {"latency": point.latency_ms / original.latency_ms, **shares}
    return shares


def describe_errors(points: Sequence[Point]) -> str:
    """Return how far measured latencies are from the predicted ones; "" if none was predicted.

    Of candidates that differ in their training only, the first counts: its latency is known when others are predicted.
    """
    first = {p.plan.form: p for p in reversed(points) if p.latency_ms}.values()
    errors = [abs(p.predicted_ms / p.latency_ms - 1) for p in first if p.predicted_ms and p.latency_ms]
    if not errors:
        return ""
    return (
        f"error of the predicted latencies: {median(errors):.1%} (median of {count(len(errors), 'candidate')}), "
        f"{max(errors):.1%} at most"
    )


def describe_unsure(points: Sequence[Point], goal: Goal) -> list[str]:
    """Return a line on the candidate that would be chosen if drops had no errors, unless it is chosen anyway."""
    best, chosen = goal.choose([replace(point, drop_error=None) for point in points]).point, goal.choose(points).point
    if (best.name, best.plan) == (chosen.name, chosen.plan):
        return []
    point = next(each for each in points if each.plan == best.plan)
    least = f"{goal.value(point) / goal.value(points[0]):.2f} of the {UNITS[goal.quantity]}"
    return [
        f"{point.name} has {least} and a drop of {spell_drop(point)}, too uncertain for {100 * goal.max_drop:g}; use "
        f"more validation samples, or --max-drop {spell_enough(point)}"
    ]


def describe_test(drop: float, max_drop: float, noun: str, tested_on: str) -> list[str]:
    """Return a warning if the drop on test samples of their own is larger than the one allowed."""
    if tested_on or drop <= max_drop + TOLERANCE:
        return []
    return [f"warning: on test {noun}s the drop is {100 * drop:.2f} points, more than {100 * max_drop:g}"]


def describe_resolution(max_drop: float, noun: str, samples: int, metric: str) -> list[str]:
    """Return a warning if so few samples cannot show the drop that is allowed, 0..1."""
    if metric not in SHARES_OF_SAMPLES:
        said = f"warning: with one validation {noun}, nobody knows how sure a drop is; use more data"
        return [said] if samples == 1 else []
    if max_drop * samples >= 1:
        return []
    return [
        f"warning: one of {count(samples, f'validation {noun}')} is {100 / samples:.1f} points, so a drop of "
        f"{100 * max_drop:g} cannot be measured; use more data"
    ]


def table(candidates: Sequence[Mapping[str, Any]], chosen: str) -> list[list[str]]:
    """Return the rows of a table of candidates, as in ``front.json``, the first its heads."""
    first = next(each for each in candidates if not each["failed"])
    timed = first["latency_ms"] is not None
    times = ["latency", "of it", "predicted"] if timed else []
    rows = [["candidate", "drop", *times, "bytes", "of it", "MACs", "minutes", ""]]
    for each in candidates:
        minutes = f"{each['minutes']:.1f}"
        if each["failed"]:
            rows.append([each["name"], *[""] * (4 + len(times)), minutes, f"failed: {each['failed']}"])
            continue
        times = []
        if timed:
            predicted = "" if each["predicted_ms"] is None else f"{each['predicted_ms']:.3f} ms"
            times = [f"{each['latency_ms']:.3f} ms", f"{each['latency_ms'] / first['latency_ms']:.2f}", predicted]
        size = [f"{each['size_bytes']:,}", f"{each['size_bytes'] / first['size_bytes']:.2f}"]
        macs = "?" if each["macs"] is None else f"{each['macs'] / 1e6:.1f} M"
        mark = "chosen" if each["name"] == chosen else "front" if each["front"] else ""
        error = spell_error(each["drop_error"], each["resolution"])
        rows.append([each["name"], f"{100 * each['drop']:+.2f}{error} pt", *times, *size, macs, minutes, mark])
    return rows


def as_markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a table in Markdown."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 2), "---"], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
