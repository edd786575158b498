"""Arrays in .npy and .npz files, read without objects and without trusting what a file says of its own size."""

import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from micronet.core.machine import available_memory
from micronet.core.parse import check_regular
from micronet.errors import MicronetError, first_line

Arrays = dict[str, NDArray[Any]]


class Header(NamedTuple):
    """What an array's header says of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_headers(path: Path) -> dict[str, Header]:
    """Read the headers of an .npz file's arrays; raise MicronetError if it is damaged, too large, or holds objects."""
    try:
        return _read_headers(path)
    except Exception as error:  # numpy and zipfile raise many types; all mean a damaged file
        raise _invalid(path, "savez", error) from error


def read_npz(path: Path) -> Arrays:
    """Read all arrays of an .npz file; raise MicronetError if it is damaged, too large, or holds objects."""
    try:
        _read_headers(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise _invalid(path, "savez", error) from error


def read_npy(path: Path) -> NDArray[Any]:
    """Read the array of an .npy file; raise MicronetError if it is damaged, too large, or holds objects."""
    try:
        check_regular(path)
        _check_memory(path.stat().st_size)
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size)
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        return array
    except MemoryError:
        raise
    except Exception as error:
        raise _invalid(path, "save", error) from error


def names_in(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz file; none if it is damaged."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile):
        return set()


def _check_memory(size: int) -> None:
    if size > available_memory():
        raise ValueError(f"its arrays take {size:,} bytes, more than the free memory")


def _read_headers(path: Path) -> dict[str, Header]:
    check_regular(path)
    found = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_memory(sum(member.file_size for member in members))
        for member in members:
            with archive.open(member) as file:
                found[member.filename.removesuffix(".npy")] = _check_header(file, member.file_size)
    return found


def _check_header(file: IO[bytes], size: int) -> Header:
    """Return an array's header; raise ValueError unless it is plain and describes the bytes that follow it."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"arrays of format {version} are not supported")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    count = 1
    for side in shape:
        count *= side
    if dtype.hasobject:
        raise ValueError("it contains pickled objects")
    if min(shape, default=0) < 0 or count * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of shape {shape} does not have the size that its header says")
    return Header(shape, dtype)


def _invalid(path: Path, save: str, error: Exception) -> MicronetError:
    if isinstance(error, OSError):
        return MicronetError(f"{path} cannot be read ({error.strerror or error})")
    return MicronetError(
        f"{path} is not a valid {path.suffix} file ({first_line(error)}); save plain arrays with numpy.{save}"
    )
