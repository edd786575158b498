"""Which network of a comparison to ship, in a sentence."""

from collections.abc import Sequence

from micronet.core.metrics import metric_label, value_text
from micronet.core.timing import is_slower
from micronet.evaluation.report import Row

ALLOWED_DROP = 1.0  # percentage points, if the user names none
SAME = 0.005  # ratios closer to 1 are not worth words
IN_PERCENT = 1.1  # the smallest ratio that is said as one


def choose(rows: Sequence[Row], allowed_drop: float) -> int:
    """Return the index of the network to ship: of those within the drop, the smallest of the fastest.

    Networks that torch only simulates are chosen only if there is nothing else. ``allowed_drop``: in percentage points.
    """
    within = [index for index, row in enumerate(rows) if index == 0 or 100 * row.drop <= allowed_drop]
    candidates = [index for index in within if not is_simulated(rows[index])] or within
    times = {index: time for index in candidates if (time := rows[index].latency_ms) is not None}
    fastest = [index for index, time in times.items() if not is_slower(time, min(times.values()))]
    return min(fastest or candidates, key=lambda index: rows[index].size_bytes)


def is_simulated(row: Row) -> bool:
    """Return True for a quantized network in torch, which computes its integers in float."""
    return row.runtime == "torch" and "quantize" in row.stages


def sentence(rows: Sequence[Row], allowed_drop: float, main: str) -> str:
    """Say which network to ship, how much smaller and faster it is than the first one, and what that costs.

    ``allowed_drop``: see ``choose``. ``main``: the task's main metric.
    """
    chosen, first = rows[choose(rows, allowed_drop)], rows[0]
    if len(rows) == 1:
        return f"{first.name} is alone; name further networks to choose from."
    if chosen is first:
        goal = "faster" if first.latency_ms is not None else "smaller"
        unit = " (hundredths of the metric)" if first.accuracy is None else " point" if allowed_drop == 1 else " points"
        return f"Ship {first.name}: none of the others is {goal} within a drop of {allowed_drop:g}{unit}."
    where = "" if chosen.runtime == first.runtime else f" in {chosen.runtime}"
    size = _ratio(first.size_bytes, chosen.size_bytes, "smaller", "larger")
    size = f"{size} than " if size else "as large as "
    rival = _rival(rows, chosen)
    speed = ""
    if rival.latency_ms is not None and chosen.latency_ms is not None:
        ratio = _ratio(rival.latency_ms, chosen.latency_ms, "faster", "slower")
        other = rival.name if rival.runtime == chosen.runtime else f"{rival.name} in {rival.runtime}"
        speed = f"; {ratio} than {other}" if ratio else f"; as fast as {other}"
    return f"Ship {chosen.name}{where}: {size}{first.name}, {_change(chosen, main)}{speed}."


def _rival(rows: Sequence[Row], chosen: Row) -> Row:
    """Return the network that a speed is compared with: the first one, or a float one in the chosen one's runtime."""
    alike = [
        row for row in rows if row.runtime == chosen.runtime and "quantize" not in row.stages and row is not chosen
    ]
    if rows[0].runtime == chosen.runtime or not alike:
        return rows[0]
    return min(alike, key=lambda row: "prune" in row.stages)


def _ratio(before: float, after: float, better: str, worse: str) -> str:
    if not after or abs(before / after - 1) < SAME:
        return ""
    ratio, word = (before / after, better) if before > after else (after / before, worse)
    return f"{ratio:.1f}x {word}" if ratio >= IN_PERCENT else f"{abs(1 - after / before):.0%} {word}"


def _change(row: Row, main: str) -> str:
    """Say how the main metric differs from the first network's."""
    if row.accuracy is not None:
        return f"{-100 * row.drop:+.2f} points" if abs(row.drop) >= 5e-5 else "the same accuracy"
    return f"{metric_label(main)} {value_text(main, row.metrics[main])}"
