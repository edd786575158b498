"""Writing files so that a crash, a full disk or Ctrl-C leaves either the old file or the new one, never half of one."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from glob import escape
from pathlib import Path

from micronet.errors import FailedError, MicronetError


def check_output_path(path: Path, force: bool, suffix: str = ".safetensors") -> None:
    """Raise MicronetError where ``path`` has another suffix, cannot be written, or is there and not to be replaced."""
    if path.suffix != suffix:
        raise MicronetError(f"{path}: the output is a {suffix} file; give -o a name that ends so")
    check_writable(path)
    if path.exists() and not force:
        raise MicronetError(f"{path} exists; add --force to overwrite it, or give another name with -o")


def check_cache_path(path: Path | None) -> None:
    """Raise MicronetError where a cache, if there is one, is no file to read and cannot be written either."""
    if path is None or not path.is_file():
        check_writable(path)


def check_writable(path: Path | None) -> None:
    """Raise MicronetError where no file can be written at ``path``, if there is one; to ask before the work."""
    if path is None:
        return
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; give a file name")
    folder = _behind_links(path).parent
    if not folder.is_dir():
        raise MicronetError(f"{folder} is no folder, so {path} cannot be written; create it first (mkdir -p {folder})")
    if not os.access(folder, os.W_OK):
        raise MicronetError(f"{folder} cannot be written to; give another place than {path}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it to disk, then rename it over ``path``.

    Where ``path`` is a link, it stays one and what it names is written.
    Raises FailedError where the system refuses (no space, no permission); the temporary file is removed in any case.
    """
    target = _behind_links(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise FailedError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of ``path`` that were killed."""
    target = _behind_links(path)
    for temporary in target.parent.glob(f".{escape(target.name)}.*"):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises FailedError where the system refuses."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises FailedError where the system refuses."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _behind_links(path: Path) -> Path:
    """Return the file that writing to ``path`` is to change."""
    return Path(os.path.realpath(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
