"""Image files, decoded to uint8 pixels of one size ahead of their use, and only once if they fit in memory.

Worker processes decode chunks of files and pause when a few chunks are waiting, so memory use does not grow with the
number of files. Decoded images are cached if all of them fit in the memory reserved for images.
"""

import copy
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from micronet.core import ranks
from micronet.core.image_size import ImageSize, cover_sides, sides, spell_size
from micronet.core.machine import available_memory, end_with_parent, usable_cores
from micronet.data.split import ImageSplit, channels_first
from micronet.errors import FailedError, MicronetError, first_line

# What Pillow may decode: formats that hold pixels and nothing else. It would hand EPS to Ghostscript, a program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # of an image whose shorter side is resized: it may be a line of a million pixels
SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
CHUNK_BYTES = 2_000_000  # of pixels: a fraction of a second of decoding, and little in a /dev/shm of 64 MB
CHUNKS_AHEAD = 2  # per worker
MAX_WORKERS = 16
GREY_MODES = ("1", "L", "I")  # Pillow's modes without colours begin so
GREY_SAMPLE = 64
MEMORY_SHARE = 1 / 4  # of the free memory for decoded images; the network needs the rest
SIDEWAYS = (5, 6, 7, 8)  # values of the Exif orientation that turn an image by 90 degrees
MEMORY_VARIABLE = "MICRONET_IMAGE_MEMORY"


class FileSplit(ImageSplit):
    """Image files, decoded when they are needed: RGB, or grey (``as_grey``)."""

    def __init__(self, paths: Sequence[Path | str], labels: Tensor, size: ImageSize) -> None:
        # One array of bytes: a million Path objects take half a gigabyte, and every worker would copy them.
        self._names = np.array([os.fsencode(path) for path in paths])
        self._rows = torch.arange(len(paths))  # where this split's images are in the names and in the cache
        self.labels, self.image_shape = labels, (3, *sides(size))
        self._cache: Tensor | None = None
        self._is_cached = torch.zeros(0, dtype=torch.bool)

    def subset(self, indices: Tensor) -> "FileSplit":
        """Return the images at ``indices`` as a split, which shares this one's cache."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[indices], self.labels[indices]
        return part

    def as_grey(self) -> "FileSplit":
        """Return the same images with one channel."""
        split = copy.copy(self)
        split.image_shape = (1, *self.image_shape[1:])
        return split

    def with_cache(self) -> "FileSplit":
        """Return the same images, each of which will be decoded only once."""
        split, count = copy.copy(self), len(self)
        split._names, split._rows = self._names[self._rows.numpy()], torch.arange(count)
        split._cache = torch.empty(count, *self.image_shape[1:], self.image_shape[0], dtype=torch.uint8)  # lazily
        split._is_cached = torch.zeros(count, dtype=torch.bool)
        return split

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, decoded ahead by worker processes.

        The first batch is decoded in this process, so that reading a single batch starts no workers.
        Raises MicronetError that names the file if one is not a readable image.
        """
        rows = [self._rows[indices] for indices in batches]
        needed = [self._chunks_to_decode(each) for each in rows]
        decode_here = partial(_decode_chunk, self._names, self.image_shape)
        decoded = chain(map(decode_here, chain(*needed[:1])), self._decode_ahead([*chain(*needed[1:])]))
        for own, chunks in zip(rows, needed, strict=True):
            yield self._assemble(own, chunks, [next(decoded) for _ in chunks])

    def _chunks_to_decode(self, rows: Tensor) -> list[Tensor]:
        """Return the uncached ones of ``rows`` in chunks."""
        uncached = rows if self._cache is None else rows[~self._is_cached[rows]]
        chunks = torch.split(uncached, max(1, CHUNK_BYTES // math.prod(self.image_shape)))
        return [chunk for chunk in chunks if len(chunk)]

    def _assemble(self, rows: Tensor, chunks: list[Tensor], decoded: list[Tensor]) -> Tensor:
        """Return the images at ``rows``; ``decoded``: the pixels of ``chunks``, their uncached ones."""
        if self._cache is None:
            return channels_first(torch.cat(decoded))
        for chunk, pixels in zip(chunks, decoded, strict=True):
            self._cache[chunk] = pixels
            self._is_cached[chunk] = True
        return channels_first(self._cache.index_select(0, rows))

    def _decode_ahead(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels of each chunk, decoded by worker processes while earlier ones are in use."""
        if not chunks:
            return
        loader: DataLoader[Any] = DataLoader(
            chunks,  # type: ignore[arg-type]  # a list has all that a DataLoader needs
            batch_size=None,
            num_workers=min(max(1, usable_cores() // ranks.local_world_size() - 1), MAX_WORKERS, len(chunks)),
            collate_fn=partial(_decode_in_worker, self._names, self.image_shape),
            prefetch_factor=CHUNKS_AHEAD,
            worker_init_fn=_follow_owner,
            generator=torch.Generator(),  # otherwise it would advance the generator of dropout
        )
        with _child_signals_untouched():
            decoded_chunks = iter(loader)
        try:
            for decoded in decoded_chunks:
                if isinstance(decoded, MicronetError):
                    raise decoded
                yield decoded
        except (RuntimeError, OSError, EOFError) as error:  # the last two if it ended during a transfer
            raise FailedError(
                f"an image-decoding process died ({first_line(error)}); if it ran out of memory, reduce --batch-size "
                f"or set the environment variable {MEMORY_VARIABLE}=0"
            ) from error


def _decode_chunk(names: Any, shape: tuple[int, int, int], rows: Tensor) -> Tensor:
    """Decode the files ``names[rows]`` as (B, H, W, C) uint8; ``shape``: (C, H, W)."""
    channels, *size = shape  # the three channels of a grey image are equal
    return torch.stack([decode(Path(os.fsdecode(name)), size)[:, :, :channels] for name in names[rows.numpy()]])


def _decode_in_worker(names: Any, shape: tuple[int, int, int], rows: Tensor) -> Tensor | MicronetError:
    """Decode a chunk. Errors are returned: one raised in a worker would arrive as the text of its traceback."""
    try:
        return _decode_chunk(names, shape, rows)
    except MicronetError as error:
        return error


def list_images(place: Path) -> list[Path]:
    """Return all image files in a folder and its subfolders, sorted by name, without hidden ones."""
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file; in this context, raise MicronetError if the file is not a readable image."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types; all mean a damaged file
        raise MicronetError(f"{path} cannot be read as an image ({error}); fix or remove it") from error


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(path: Path, size: ImageSize, channels: int = 3) -> Tensor:
    """Read an image file as (H, W, channels) uint8: resized to cover the size, then centre-cropped.

    ``channels``: 1 for grey, 3 for RGB, 4 with transparency.
    """
    with open_image(path) as image:
        plain = _eight_bits(ImageOps.exif_transpose(image)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
        pixels = np.array(plain if plain.size == sides(size)[::-1] else cover(plain, size))
        return torch.from_numpy(pixels.reshape(*sides(size), channels))


def upright_size(path: Path) -> tuple[int, int]:
    """Return the height and the width in pixels of an image file, turned upright as its Exif orientation says."""
    with open_image(path) as image:
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def are_grey(paths: Sequence[Path]) -> bool:
    """Return True if the image files have no colours, judged by the formats of some of them."""
    for path in paths[:: max(1, len(paths) // GREY_SAMPLE)]:
        with open_image(path) as image:
            if not image.mode.startswith(GREY_MODES):
                return False
    return len(paths) > 0


def image_memory() -> int:
    """Return the bytes that decoded images may take: the environment variable's GiB, or a share of free memory."""
    text = os.environ.get(MEMORY_VARIABLE)
    if text is None:
        return int(available_memory() * MEMORY_SHARE / ranks.local_world_size())
    try:
        size_bytes = int(float(text) * 2**30)
        if size_bytes >= 0:
            return size_bytes
    except (ValueError, OverflowError):  # not a number, or infinite
        pass
    raise MicronetError(
        f"the environment variable {MEMORY_VARIABLE} is {text!r}; expected a number of GiB, or 0 to disable the image "
        "cache"
    )


@contextmanager
def _child_signals_untouched() -> Iterator[None]:
    """Restore SIGCHLD's handler: torch's would raise a worker's death anywhere; its loader notices it in 5 seconds."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _follow_owner(worker: int) -> None:
    """End with the process that owns the workers; leave Ctrl-C to it, which the terminal sends to every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    sys.excepthook = lambda *error: None  # of the thread that hands images over, if the owner ends meanwhile


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow's conversion would clip, to 8 bits; refuse float pixels."""
    if image.mode == "F":
        raise ValueError("its pixels are floats with an unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def cover(image: Image.Image, size: ImageSize, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Return an image of some size: resized in proportion to cover it, then centre-cropped."""
    width, height = image.size
    (rows, columns), (high, wide) = sides(size), cover_sides((height, width), size)
    if wide * high > max(MOST_PIXELS, width * height):
        raise ValueError(f"it is {height}x{width} (height x width), too long for images of {spell_size(size)}")
    left, top = (wide - columns) // 2, (high - rows) // 2
    return image.resize((wide, high), resample).crop((left, top, left + columns, top + rows))
