"""Image files, decoded to square uint8 pixels ahead of their use, and only once if they fit in memory.

Worker processes decode chunks of files and pause when a few chunks are waiting, so memory use does not grow with the
number of files. Decoded images are cached if all of them fit in the memory reserved for images.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from micronet.core import ranks
from micronet.core.machine import available_memory, usable_cores
from micronet.errors import FailedError, MicronetError, first_line

SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
CHUNK_BYTES = 2_000_000  # of pixels: a fraction of a second of decoding, and little in a /dev/shm of 64 MB
CHUNKS_AHEAD = 2  # per worker
MAX_WORKERS = 16
MEMORY_SHARE = 1 / 4  # of the free memory for decoded images; the network needs the rest
MEMORY_VARIABLE = "MICRONET_IMAGE_MEMORY"


class ImageFiles:
    """Image files, each decoded to (size, size) pixels when it is needed; ``cache``: keep them in memory."""

    def __init__(self, paths: Iterable[Path | str], size: int, *, cache: bool = False) -> None:
        # One array of bytes: a million Path objects take half a gigabyte, and every worker would copy them.
        self._names = np.array([os.fsencode(path) for path in paths])
        self.size = size
        count = len(self._names) if cache else 0
        self._pixels = torch.empty(count, size, size, 3, dtype=torch.uint8)  # takes no memory until written
        self._cached = torch.zeros(count, dtype=torch.bool)

    def with_cache(self, rows: Tensor) -> "ImageFiles":
        """Return the files at ``rows`` (N,), with a cache of their pixels."""
        return ImageFiles(map(os.fsdecode, self._names[rows.numpy()]), self.size, cache=True)

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at ``rows`` (B,) as (B, 3, size, size) uint8."""
        return next(self.stream([rows]))

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of rows, (B,) each.

        The first batch is decoded in this process, so that reading a single batch starts no workers.
        Raises MicronetError that names the file if one is not a readable image.
        """
        for rows in batches[:1]:
            uncached = self._uncached(rows)
            yield self._images(rows, uncached, [self._decode(uncached)])
        needed = [torch.split(self._uncached(rows), self._chunk) for rows in batches[1:]]
        decoded = self._decode_ahead([chunk for chunks in needed for chunk in chunks if len(chunk)])
        for rows, chunks in zip(batches[1:], needed, strict=True):
            yield self._images(rows, torch.cat(chunks), [next(decoded) for chunk in chunks if len(chunk)])

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_BYTES // (3 * self.size**2))

    def _uncached(self, rows: Tensor) -> Tensor:
        """Return the rows that must be decoded."""
        return rows[~self._cached[rows]] if len(self._cached) else rows

    def _images(self, rows: Tensor, uncached: Tensor, decoded: list[Tensor]) -> Tensor:
        """Return the images at ``rows``; ``decoded``: the pixels of the uncached ones."""
        if not len(self._cached):
            return channels_first(torch.cat(decoded))
        if decoded:
            self._pixels[uncached] = torch.cat(decoded)
            self._cached[uncached] = True
        return channels_first(self._pixels.index_select(0, rows))

    def _decode(self, rows: Tensor) -> Tensor:
        return _Decoder(self._names, self.size, [rows]).decode(0)

    def _decode_ahead(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels of each chunk, decoded by worker processes while earlier ones are in use."""
        if not chunks:
            return
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self._names, self.size, chunks),  # type: ignore[arg-type]  # it has all that a DataLoader needs
            batch_size=None,
            num_workers=min(max(1, usable_cores() // ranks.local_world_size() - 1), MAX_WORKERS, len(chunks)),
            prefetch_factor=CHUNKS_AHEAD,
            worker_init_fn=_ignore_interrupts,
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
                f"a process that decodes images ended unexpectedly ({first_line(error)}); if memory ran out, lower "
                f"--batch-size or set the environment variable {MEMORY_VARIABLE}=0"
            ) from error


class _Decoder:
    """A worker's data set: item i is the i-th chunk of files, decoded."""

    def __init__(self, names: Any, size: int, chunks: list[Tensor]) -> None:
        self._names, self._size, self._chunks = names, size, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Tensor | MicronetError:
        """Decode a chunk. Errors are returned: one raised in a worker would arrive as the text of its traceback."""
        try:
            return self.decode(index)
        except MicronetError as error:
            return error

    def decode(self, index: int) -> Tensor:
        """Decode a chunk as (B, size, size, 3) uint8."""
        rows = self._chunks[index]
        images = torch.empty(len(rows), self._size, self._size, 3, dtype=torch.uint8)
        for image, name in zip(images, self._names[rows.numpy()], strict=True):
            image.copy_(decode(Path(os.fsdecode(name)), self._size))
        return images


def channels_first(pixels: Tensor) -> Tensor:
    """Return a (B, C, H, W) view of contiguous (B, H, W, C) pixels.

    Images of one channel get contiguous strides. Otherwise torch would take them for channels last, which
    ``models.device.memory_format`` rules out for some networks.
    """
    count, height, width, channels = pixels.shape
    return pixels.view(count, 1, height, width) if channels == 1 else pixels.permute(0, 3, 1, 2)


def list_images(place: Path) -> list[Path]:
    """Return all image files in a folder and its subfolders, sorted by name, without hidden ones."""
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def decode(path: Path, size: int) -> Tensor:
    """Read an image file as (size, size, 3) uint8 RGB: shorter side resized, then centre-cropped.

    Raises MicronetError if the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            rgb = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
            if rgb.size != (size, size):
                rgb = _square(rgb, size)
            return torch.from_numpy(np.array(rgb))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise MicronetError(f"{path} cannot be read as an image ({error}); fix or remove it") from error


def image_memory() -> int:
    """Return the bytes that decoded images may take: the environment variable's GiB, or a share of free memory."""
    text = os.environ.get(MEMORY_VARIABLE)
    if text is None:
        return int(available_memory() * MEMORY_SHARE / ranks.local_world_size())
    try:
        size_bytes = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size_bytes = -1
    if size_bytes < 0:
        raise MicronetError(
            f"the environment variable {MEMORY_VARIABLE} is {text!r}; allowed: a number of GiB, or 0 to cache no images"
        )
    return size_bytes


@contextmanager
def _child_signals_untouched() -> Iterator[None]:
    """Restore SIGCHLD's handler afterwards: torch's would raise a worker's death anywhere in the program.

    The loader itself also notices a dead worker, within five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which the terminal sends to every process, to the process that owns the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow's conversion would clip, to 8 bits; refuse float pixels."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
