"""Image files decoded to square uint8 pixels, ahead of whoever uses them and, where there is room, once only.

Worker processes decode the chunks they are given and stop when a few are waiting, so memory stays bounded however many
files there are. What was decoded is remembered where all of it fits the memory set aside for images.
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
CHUNK_BYTES = 2_000_000  # a worker's piece of work: a fraction of a second, and little beside a 64 MB /dev/shm
CHUNKS_AHEAD = 2  # a worker
MOST_WORKERS = 16
MEMORY_SHARE = 1 / 4  # of what is free, for decoded images; the rest is the network's
MEMORY_VARIABLE = "MICRONET_IMAGE_MEMORY"


class ImageFiles:
    """Files and, if ``remember``, their pixels once they are decoded."""

    def __init__(self, paths: Iterable[Path | str], size: int, *, remember: bool = False) -> None:
        # One block of bytes: a million Path objects take half a gigabyte, and each worker would come to copy them.
        self._names = np.array([os.fsencode(path) for path in paths])
        self.size = size
        count = len(self._names) if remember else 0
        self._pixels = torch.empty(count, size, size, 3, dtype=torch.uint8)  # costs memory only where written
        self._known = torch.zeros(count, dtype=torch.bool)

    def remembering(self, rows: Tensor) -> "ImageFiles":
        """Return the files of ``rows`` (N,), which will remember what they decode."""
        return ImageFiles(map(os.fsdecode, self._names[rows.numpy()]), self.size, remember=True)

    def read(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` (B,) as (B, 3, size, size) uint8."""
        return next(self.stream([rows]))

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each (B,) of ``batches``: the first decoded here, later ones by workers.

        So a reader of one batch starts no process. Raises MicronetError that names a file that is no image.
        """
        for rows in batches[:1]:
            unknown = self._unknown(rows)
            yield self._images(rows, unknown, [self._decode(unknown)])
        needed = [torch.split(self._unknown(rows), self._chunk) for rows in batches[1:]]
        decoded = self._decode_ahead([chunk for chunks in needed for chunk in chunks if len(chunk)])
        for rows, chunks in zip(batches[1:], needed, strict=True):
            yield self._images(rows, torch.cat(chunks), [next(decoded) for chunk in chunks if len(chunk)])

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_BYTES // (3 * self.size**2))

    def _unknown(self, rows: Tensor) -> Tensor:
        """Return those of ``rows`` that must be decoded."""
        return rows[~self._known[rows]] if len(self._known) else rows

    def _images(self, rows: Tensor, unknown: Tensor, decoded: list[Tensor]) -> Tensor:
        """Return the images of ``rows``, of which the ``unknown`` ones have just been decoded."""
        if not len(self._known):
            return channels_first(torch.cat(decoded))
        if decoded:
            self._pixels[unknown] = torch.cat(decoded)
            self._known[unknown] = True
        return channels_first(self._pixels.index_select(0, rows))

    def _decode(self, rows: Tensor) -> Tensor:
        return _Decoder(self._names, self.size, [rows]).decode(0)

    def _decode_ahead(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels of each chunk, decoded by worker processes while earlier ones are in use."""
        if not chunks:
            return
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self._names, self.size, chunks),  # type: ignore[arg-type]  # it is all that a DataLoader asks for
            batch_size=None,
            num_workers=min(max(1, usable_cores() // ranks.local_world_size() - 1), MOST_WORKERS, len(chunks)),
            prefetch_factor=CHUNKS_AHEAD,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
        )
        with _child_signals_untouched():
            decoded_chunks = iter(loader)
        try:
            for decoded in decoded_chunks:
                if isinstance(decoded, MicronetError):
                    raise decoded
                yield decoded
        except (RuntimeError, OSError, EOFError) as error:  # the last two where it ended while it handed images over
            raise FailedError(
                f"a process that decodes images ended ({first_line(error)}); where memory ran out, lower --batch-size "
                f"or set {MEMORY_VARIABLE}=0"
            ) from error


class _Decoder:
    """What a worker is given: the names, and the chunks of them that it will be asked for by number."""

    def __init__(self, names: Any, size: int, chunks: list[Tensor]) -> None:
        self._names, self._size, self._chunks = names, size, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Tensor | MicronetError:
        """Decode a chunk; an error is returned, since one raised in a worker comes out as its traceback's text."""
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
    """Return (B, H, W, C), contiguous, seen as (B, C, H, W).

    Images of one channel get the strides of plain memory: by others torch would run every network channels last, also
    those of ``machine.memory_format`` for which that is wrong.
    """
    count, height, width, channels = pixels.shape
    return pixels.view(count, 1, height, width) if channels == 1 else pixels.permute(0, 3, 1, 2)


def list_images(place: Path) -> list[Path]:
    """Return the image files below a folder, sorted by name; hidden files and folders are left out."""
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def decode(path: Path, size: int) -> Tensor:
    """Read one image file as (size, size, 3) uint8 RGB, resized (short side) and centre-cropped.

    Raises MicronetError where it is no readable image.
    """
    try:
        with Image.open(path) as image:
            rgb = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
            if rgb.size != (size, size):
                rgb = _square(rgb, size)
            return torch.from_numpy(np.array(rgb))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise MicronetError(f"{path} cannot be read as an image ({error}); mend it or take it away") from error


def image_memory() -> int:
    """Return the bytes that decoded images may take: what the user says in GiB, or a share of what is free."""
    said = os.environ.get(MEMORY_VARIABLE)
    if said is None:
        return int(available_memory() * MEMORY_SHARE / ranks.local_world_size())
    try:
        room = int(float(said) * 2**30)
    except (ValueError, OverflowError):
        room = -1
    if room < 0:
        raise MicronetError(f"{MEMORY_VARIABLE} is {said!r}; allowed: a number of GiB, 0 to keep no image")
    return room


@contextmanager
def _child_signals_untouched() -> Iterator[None]:
    """Put SIGCHLD's handler back: torch's raises a worker's death wherever the program happens to be.

    The loader looks for it too, every five seconds that nothing comes.
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
    """Leave Ctrl-C, which reaches every process of the terminal, to the process that owns the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which a plain conversion would clip to white; refuse float pixels."""
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
