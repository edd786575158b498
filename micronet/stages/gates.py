"""The gates of ``compare``: limits that make it exit with code 1, and what they say of each network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from micronet.core.config import Settings, changed, flag, setting
from micronet.errors import FailedError, MicronetError
from micronet.stages.words import row_labels

if TYPE_CHECKING:
    from micronet.evaluation.report import Row

RELATIVE = ("min_speedup", "min_agreement")  # gates that need a second network
TIMED = ("min_speedup", "max_latency")
LEAST_PERCENT = 2  # 1 would be a fraction by mistake


@dataclass(frozen=True)
class GateConfig(Settings):
    """Gates."""

    max_drop: float | None = setting(
        None, 
            "Exit with code 1 if the accuracy of any network is more than this many percentage points below that of "
            "the first; of other tasks, if the main metric is worse by more than this many hundredths.",
        basic=True,
    )  # fmt: skip
    max_size: float | None = setting(
        None,
        "Exit with code 1 if a file is larger: in bytes or, up to 1, as a fraction of the first file's size.",
        basic=True,
    )
    min_speedup: float | None = setting(
        None,
        "Exit with code 1 if a network takes more than 1/N of the first one's time for one sample (medians); 2 is "
        "twice as fast.",
        low=0,
        basic=True,
        metavar="N",
    )
    max_latency: float | None = setting(
        None, "Exit with code 1 if the median time for one sample is longer, in milliseconds.", low=0, basic=True
    )
    min_agreement: float | None = setting(
        None,
        "Exit with code 1 if a network chooses the first one's class for less than this percentage of the images.",
        low=LEAST_PERCENT,
        high=100,
        basic=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.max_size
        if size is not None and (size <= 0 or (size > 1 and size != int(size))):
            raise MicronetError(
                f"--max-size is {size:g}; expected a number of bytes, for example 100000, or a fraction of the first "
                "file's size, for example 0.5"
            )

    def check(self, networks: int, *, timed: bool) -> None:
        """Raise MicronetError if a gate has nothing to judge: one network alone, or no latencies."""
        for name in changed(self):
            if networks == 1 and (name in RELATIVE or (name == "max_size" and self.max_size <= 1)):  # type: ignore[operator]
                raise MicronetError(f"{flag(name)} compares with the first network; add a second one, or drop it")
            if name in TIMED and not timed:
                raise MicronetError(f"{flag(name)} needs latencies; drop --skip-timing or {flag(name)}")


class Verdict(NamedTuple):
    """What a gate says of a network: ``problem`` is a sentence, or empty if the gate holds."""

    network: str
    gate: str
    limit: float
    problem: str


def verdicts(rows: "Sequence[Row]", gates: GateConfig) -> list[Verdict]:
    """Return what each gate says of each network but the first, or of a single one; ``max_drop`` judges the first too.

    Raises MicronetError if a gate does not apply to the networks' task.
    """
    labels = row_labels(rows)
    return [
        Verdict(label, flag(gate), limit, problem)
        for row, label in zip(rows, labels, strict=True)
        for gate, limit, problem in _judge(row, rows[0], labels[0], gates)
        if row is not rows[0] or len(rows) == 1 or gate == "max_drop"
    ]


def _judge(row: "Row", first: "Row", rival: str, gates: GateConfig) -> Iterator[tuple[str, float, str]]:
    """Yield each gate that is set, its limit, and what is wrong with a row, or nothing. A figure that is NaN fails."""
    if (points := gates.max_drop) is not None:
        text = f"is {100 * row.drop:.2f} percentage points less accurate than {rival}; --max-drop allows {points:,.10g}"
        if row.accuracy is None:
            text = (
                f"is worse than {rival} by {row.drop:.4f} in the main metric; --max-drop {points:.10g} allows "
                f"{points / 100:.10g}"
            )
        yield "max_drop", points, text if not 100 * row.drop <= points else ""
    if (size := gates.max_size) is not None:
        share, most = (row.size_bytes / first.size_bytes, size) if size <= 1 else (row.size_bytes, size)
        shown, allowed = (f"{share:.2%} of {rival}'s", f"{size:.2%}") if size <= 1 else ("", f"{size:,.0f}")
        text = f"has {row.size_bytes:,} bytes{f', {shown}' if shown else ''}; --max-size allows {allowed}"
        yield "max_size", size, text if share > most else ""
    if (times := gates.min_speedup) is not None and row.latency_ms and first.latency_ms:
        speedup = first.latency_ms / row.latency_ms
        text = f"is {speedup:.2f} times as fast as {rival} ({row.latency_ms:.2f} ms vs. {first.latency_ms:.2f} ms)"
        yield "min_speedup", times, f"{text}; --min-speedup requires {times:,.10g}" if speedup < times else ""
    if (longest := gates.max_latency) is not None and row.latency_ms is not None:
        text = f"takes {row.latency_ms:.2f} ms for one sample; --max-latency allows {longest:,.10g}"
        yield "max_latency", longest, text if row.latency_ms > longest else ""
    if (percent := gates.min_agreement) is not None:
        if row.agreement is None:
            raise MicronetError("--min-agreement only applies to classification; drop it, or use --max-drop")
        text = f"agrees with {rival} on {row.agreement:.2%}; --min-agreement requires {percent:,.10g}%"
        yield "min_agreement", percent, text if 100 * row.agreement < percent else ""


def require(found: Sequence[Verdict]) -> None:
    """Raise FailedError that names the network and the figure of the first gate that fails, and counts the others."""
    failed = [f"{each.network} {each.problem}" for each in found if each.problem]
    if failed:
        others = [f"{each.network} fails {each.gate}" for each in found if each.problem][1:]
        more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
        raise FailedError(f"{failed[0]}{more}")
