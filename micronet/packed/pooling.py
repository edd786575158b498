"""What the windows of a pool cover."""

from typing import NamedTuple

from micronet.packed.program import Operation


class Windows(NamedTuple):
    """The windows of a pool: their size, how far apart they are, and how many rows and columns of them there are."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    rows: int
    columns: int
    count_pads: bool  # whether an average counts the padding


def windows_of(operation: Operation, rows: int, columns: int) -> Windows:
    """Return the windows of a pool, or the one of an average over height and width, on a map of rows and columns."""
    attributes = operation.attributes if operation.kind != "mean" else {"kernel": [rows, columns]}
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    (ky, kx), (sy, sx) = attributes["kernel"], attributes.get("stride", [1, 1])
    down, across = attributes.get("extra", [0, 0])
    return Windows(
        (ky, kx), (sy, sx), (top, left, bottom, right), (rows + top + bottom + down - ky) // sy + 1,
        (columns + left + right + across - kx) // sx + 1, bool(attributes.get("count_pads")),
    )  # fmt: skip
