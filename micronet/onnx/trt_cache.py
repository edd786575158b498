"""Calibration caches of TensorRT 10 and earlier."""

import re
import struct
from pathlib import Path

from micronet.core.parse import read_text
from micronet.errors import MicronetError
from micronet.onnx.insertion import ValueRange

INT8_MAX = 127
LEGACY_HEADER = "TRT-"
LEGACY_LINE = re.compile(r"\s*(?P<name>\S.*?)\s*:\s*(?P<scale>[0-9a-fA-F]{1,8})\s*")
MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**120  # so that the scale and 127 times the scale are normal float32


def is_legacy_cache(path: Path) -> bool:
    """Return True if a file begins as such a cache does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LEGACY_HEADER)) == LEGACY_HEADER.encode()


def read_legacy_cache(path: Path) -> dict[str, ValueRange]:
    """Read a calibration cache of TensorRT 10 or earlier; raise MicronetError if it is damaged or another file.

    A ``TRT-…`` header precedes ``name: scale`` lines. The scale is a float32 as big-endian hexadecimal bytes. A
    tensor's range is 127 scales to either side of 0.
    """
    try:
        header, *lines = read_text(path).splitlines()
    except ValueError as error:  # not UTF-8, or empty
        raise MicronetError(
            f"{path} is not a TensorRT calibration cache, which must start with TRT-…; check the path"
        ) from error
    if not header.startswith(LEGACY_HEADER):
        raise MicronetError(f"{path} is not a TensorRT calibration cache: its first line is {header[:40]!r}, not TRT-…")
    ranges: dict[str, ValueRange] = {}
    for number, line in enumerate(filter(str.strip, lines), 2):
        match = LEGACY_LINE.fullmatch(line)
        scale = struct.unpack(">f", bytes.fromhex(match["scale"].rjust(8, "0")))[0] if match else 0.0
        if match is not None and scale == 0:  # the tensor was always zero, so it has no range
            continue
        if match is None or not MIN_SCALE <= scale <= MAX_SCALE or match["name"] in ranges:
            raise MicronetError(
                f"{path}, line {number} is {line[:60]!r}; expected 'name: hexadecimal float', with no duplicate names"
            )
        ranges[match["name"]] = (-INT8_MAX * scale, INT8_MAX * scale)
    if not ranges:
        raise MicronetError(f"{path} contains no ranges; recreate it")
    return ranges
