"""Sizes of images as users and files write them: N for NxN pixels, otherwise the height and the width."""

from micronet.errors import MicronetError

LARGEST = 2**14  # pixels a side
ImageSize = int | list[int]  # of NxN pixels, N; otherwise [height, width]


def parse_size(size: int | str | list[int] | None) -> ImageSize | None:
    """Return a size in the form that files record, from ``64``, ``"64"``, ``"240x320"`` or ``[240, 320]``.

    Raises MicronetError for anything else.
    """
    if size is None:
        return None
    text = "x".join(map(str, size)) if isinstance(size, list) else str(size)
    numbers = text.lower().split("x")
    digits = len(numbers) < 3 and all(each.isdecimal() and len(each) < 6 for each in numbers)
    if not digits or not all(1 <= int(each) <= LARGEST for each in numbers):
        raise MicronetError(
            f"--image-size is {text!r}; expected N, or HEIGHTxWIDTH such as 240x320, each from 1 to {LARGEST}"
        )
    return size_of(int(numbers[0]), int(numbers[-1]))


def size_of(height: int, width: int) -> ImageSize:
    """Return a height and a width in pixels as a size."""
    return height if height == width else [height, width]


def sides(size: ImageSize) -> tuple[int, int]:
    """Return the height and the width in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def cover_sides(own: tuple[int, int], size: ImageSize) -> tuple[int, int]:
    """Return the height and the width to which an image is resized, in proportion, so that it covers a size."""
    (height, width), (rows, columns) = own, sides(size)
    scale = max(rows / height, columns / width)
    return max(rows, round(height * scale)), max(columns, round(width * scale))


def spell_size(size: ImageSize) -> str:
    """Return a size in words: ``240x320``, or ``64x64``."""
    return "x".join(map(str, sides(size)))
