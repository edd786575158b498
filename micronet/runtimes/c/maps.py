"""Feature maps in the arena of the generated code, and where each lies."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from micronet import registry
from micronet.errors import MicronetError, either

BITS, BYTES, INTS, FLOATS = "BITS", "BYTES", "INTS", "FLOATS"  # signs, uint8, int32, float: as in kernels/base.h
ALIGNMENT = 8
MAX_BYTES = 1 << 30  # of an arena
MAX_LEVEL = 1 << 21  # of integers that are rounded exactly in float32


@dataclass(eq=False)
class Buffer:
    """Memory of one or more maps. first, last: the calls that write it first and read it last. place: in the arena."""

    size: int = 0
    first: int = -1
    last: int = -1
    place: int = 0

    def overlaps(self, other: "Buffer") -> bool:
        """Return True if both are in use at some time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(eq=False)
class Map:
    """A feature map; with BYTES or INTS, integers for (q - zero) * scale, from ``low`` to ``high``.

    flat: its values are one row of channels, rows and columns, although its pixels still lie in place. vector: the
    network sees (N, C), not (N, C, H, W).
    """

    type: str
    rows: int
    columns: int
    channels: int
    scale: float = 1.0
    zero: int = 0
    low: int = 0
    high: int = 0
    flat: bool = False
    vector: bool = False
    buffer: Buffer = field(default_factory=Buffer)

    def __post_init__(self) -> None:
        self.buffer.size = max(self.buffer.size, self.bytes)

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.rows * self.columns

    @property
    def pixel_bytes(self) -> int:
        """Bytes from one pixel to the next."""
        return {BITS: -(-self.channels // 64) * 8, BYTES: self.channels}.get(self.type, 4 * self.channels)

    @property
    def bytes(self) -> int:
        """The bytes that the map takes."""
        return self.pixels * self.pixel_bytes

    @property
    def quantization(self) -> tuple[Any, ...]:
        """What two maps must share for their stored values to mean the same."""
        return self.type, self.scale, self.zero


class Call(NamedTuple):
    """A call of a kernel: its C code with the names of the maps left out, and what it reads and writes.

    operation: its number in the program, or -1 for the image. in_place: it may write to its first input's memory.
    """

    kernel: str
    operation: int
    reads: list[Map]
    writes: list[Map]
    arguments: str = ""
    in_place: bool = False


def integers(scale: float, zero: int, low: int, high: int) -> dict[str, Any]:
    """Return the type and quantization of a map of integers; signed ones of 8 bits are stored as unsigned ones."""
    if max(abs(low), abs(high)) > MAX_LEVEL:
        raise MicronetError(
            f"--target c runs quantizers of at most 21 bits, but this one has levels from {low} to {high}; quantize "
            f"to fewer bits, or use micronet export --target {either(registry.RUN_ANY)}"
        )
    shift = 0 if low >= 0 else 128
    small = low + shift >= 0 and high + shift <= 255
    shift = shift if small else 0
    return {
        "type": BYTES if small else INTS,
        "scale": scale, "zero": zero + shift, "low": low + shift, "high": high + shift,
    }  # fmt: skip


def place_buffers(calls: list[Call]) -> int:
    """Give each buffer its place in the arena; return the arena's bytes.

    Buffers that are in use at the same time do not overlap; the largest are placed first, each as low as it fits.
    """
    for number, call in enumerate(calls):
        for each in (*call.reads, *call.writes):
            buffer = each.buffer
            buffer.first = number if buffer.first < 0 else buffer.first
            buffer.last = number
    _reuse_inputs(calls)
    placed: list[Buffer] = []
    found = {id(each.buffer): each.buffer for call in calls for each in (*call.reads, *call.writes)}
    for buffer in sorted(found.values(), key=lambda each: (-each.size, each.first)):
        size, place = buffer.size, 0
        for other in sorted((each for each in placed if each.overlaps(buffer)), key=lambda each: each.place):
            if place + size <= other.place:
                break
            place = max(place, _aligned(other.place + other.size))
        buffer.place = place
        placed.append(buffer)
    total = max((_aligned(each.place + each.size) for each in placed), default=0)
    if total > MAX_BYTES:
        raise MicronetError(
            f"the network's feature maps need {total >> 20} MiB, more than --target c allows (1024 MiB)"
        )
    return total


def _reuse_inputs(calls: list[Call]) -> None:
    """Let calls that may write to their first input's memory do so if nothing reads that later."""
    for number, call in enumerate(calls):
        if not call.in_place:
            continue
        x, out = call.reads[0], call.writes[0]
        alike = (x.type, x.pixel_bytes, x.pixels) == (out.type, out.pixel_bytes, out.pixels)
        if alike and x.buffer.last == number and out.buffer.first == number:
            merged, old = x.buffer, out.buffer
            merged.last = old.last
            for later in calls:
                for each in (*later.reads, *later.writes):
                    if each.buffer is old:
                        each.buffer = merged


def live_bytes(calls: list[Call], number: int) -> int:
    """Return the bytes of the buffers that are in use during a call."""
    found = {id(each.buffer): each.buffer for call in calls for each in (*call.reads, *call.writes)}
    return sum(_aligned(each.size) for each in found.values() if each.first <= number <= each.last)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
