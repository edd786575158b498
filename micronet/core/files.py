"""Files: their kinds, and writing them so that a crash, a full disk or Ctrl-C never leaves half of one."""

import hashlib
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO

from micronet.core.parse import parse_json
from micronet.errors import FailedError, MicronetError

_MARK = ".micronet-"  # in the names of temporary files
_FOLDER = "micronet-run-"  # begins the names of temporary folders
# A file's suffix -> what it is, and what to do with it.
_IMPORT = "import it with micronet import --model NAME --weights FILE"
FOLDER, NOTE = "", "micronet.json"  # in place of a suffix: a folder that export wrote; its note
_KINDS = {
    ".safetensors": ("an artifact", "convert it with micronet export-onnx or trt-build"),
    ".onnx": ("an ONNX file", "use it with micronet evaluate, check-onnx, trt-build or quantize --mode ptq"),
    ".packed": ("a packed network", "use it with micronet evaluate, compare or predict"),
    ".engine": ("a TensorRT engine", "use it with micronet trt-eval, evaluate or compare"),
    ".pth": ("a PyTorch checkpoint", _IMPORT),
    ".pt": ("a PyTorch checkpoint", _IMPORT),
    ".toml": ("a recipe", "run it with micronet run"),
}


def check_file_kind(path: Path, *taken: str) -> None:
    """Raise MicronetError if a path is a folder, or a known kind of file whose suffix is not in ``taken``.

    Unknown suffixes pass; such a file is checked when it is opened.
    """
    if FOLDER in taken and (path / NOTE).is_file():
        return
    kinds = [
        f"{_KINDS[suffix][0]} ({suffix})" if suffix in _KINDS else f"a {suffix} file" for suffix in taken if suffix
    ]
    words = kinds + ["a folder from micronet export"] * (FOLDER in taken)
    expected = " or ".join(words)
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; expected {expected}; specify a file in it")
    what, instead = _KINDS.get(path.suffix, ("", ""))
    if what and path.suffix not in taken:
        raise MicronetError(f"{path} is {what}; expected {expected}; {instead}")


def short_names(paths: Iterable[Path]) -> list[str]:
    """Return what to call each path: its name, with as many of its folders as tell different ones apart."""
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100  # resolve() follows links
    deepest = max((len(path.parts) for path in absolute), default=0)
    for depth in range(1, deepest + 1):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(set(absolute)):
            return names
    return [str(path) for path in absolute]


def check_output_path(path: Path, force: bool, suffix: str = ".safetensors") -> None:
    """Raise MicronetError if ``path`` has another suffix, cannot be written, or exists without ``force``."""
    if path.suffix != suffix:
        raise MicronetError(
            f"{path} does not end in {suffix}, the suffix of the files that this command writes; choose another name "
            "with -o"
        )
    check_writable(path)
    if path.exists() and not force:
        raise MicronetError(f"{path} already exists; add --force to overwrite it, or choose another name with -o")


def check_cache_path(path: Path | None) -> None:
    """Raise MicronetError if a cache's path is neither a file nor writable; None passes."""
    if path is None or not path.is_file():
        check_writable(path)


def check_report_path(path: Path | None) -> None:
    """Raise MicronetError if a report, a chart or a log cannot be written at ``path``; None passes.

    Names of networks, checkpoints and recipes are refused, so that a slip does not replace one.
    """
    if path is not None and path.suffix in _KINDS:
        raise MicronetError(f"{path} ends in {path.suffix}, as {_KINDS[path.suffix][0]} does; choose another name")
    check_writable(path)


def check_writable(path: Path | None) -> None:
    """Raise MicronetError if no file can be written at ``path``; None passes. Check this before the work."""
    if path is None:
        return
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; specify a file")
    if path.exists() and not path.is_file():  # root could replace /dev/null by a file
        raise MicronetError(f"{path} is a pipe or a device; specify a file")
    folder = _follow_links(path).parent
    if not folder.is_dir():
        raise MicronetError(
            f"{path} cannot be written because the folder {folder} does not exist; create it with mkdir -p "
            f"{shlex.quote(str(folder))}"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):  # os.access says nothing of /proc, nor to root
            pass
    except OSError as error:
        raise MicronetError(
            f"{path} cannot be written because {folder} takes no files ({error.strerror or error}); choose another "
            "folder"
        ) from error


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all: a temporary file beside it is synced to disk, then renamed.

    If ``path`` is a symbolic link, its target is written. Temporary files that killed processes left are removed.

    Raises:
        FailedError: The system refused, for example because the disk is full.
        MicronetError: ``path`` is a folder, a pipe or a device.
    """
    target = _follow_links(path)
    if target.exists() and not target.is_file():
        check_writable(target)
    remove_leftovers(target)
    try:
        with _temporary_beside(target) as (file, temporary):
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise FailedError(f"{path} could not be written ({error.strerror or error})") from error


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed processes left when writing ``path``; those in use are locked, and stay."""
    target = _follow_links(path)
    for temporary in target.parent.glob(leftovers(target)):
        with suppress(OSError):
            if stat.S_ISREG(temporary.lstat().st_mode):
                with temporary.open("r+b") as file:
                    if _lock(file.fileno()):
                        temporary.unlink(missing_ok=True)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Give a new, locked file beside a target, and remove it unless it is renamed."""
    while True:
        path = target.with_name(f".{target.name}{_MARK}{os.urandom(6).hex()}")
        with path.open("x+b") as file:  # mkstemp would make it private
            if _lock(file.fileno()) is False or not os.fstat(file.fileno()).st_nlink:  # taken for a leftover
                continue
            try:
                yield file, path
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def temporary_folder(beside: Path | None = None, keep: str | None = None) -> Iterator[Path]:
    """Give an empty folder for this context; remove those that killed processes left.

    It is among the system's temporary files, or hidden ``beside`` a path, from where it can be renamed to that. Those
    with an entry of the name ``keep`` stay.
    """
    place = Path(tempfile.gettempdir()) if beside is None else beside.parent
    prefix = _FOLDER if beside is None else f".{beside.name}{_MARK}"
    if not hasattr(os, "O_DIRECTORY"):  # Windows locks no folders
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as name:
            yield Path(name)
        return
    for left in place.glob(f"{escape(prefix)}*"):
        with suppress(OSError), _open_folder(left) as handle:
            kept = keep is not None and (left / keep).exists()
            if os.fstat(handle).st_uid == os.geteuid() and not kept and _lock(handle):
                shutil.rmtree(left, ignore_errors=True)
    while True:
        temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
        with temporary as name, ExitStack() as opened:
            try:
                handle = opened.enter_context(_open_folder(Path(name)))
            except FileNotFoundError:  # another process took it for a leftover
                continue
            if _lock(handle) is False or not Path(name).is_dir():  # and here
                continue
            yield Path(name)
            return


def leftovers(path: Path) -> str:
    """Return the pattern of the names of temporary files and folders beside a path."""
    return f".{escape(path.name)}{_MARK}*"


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock a file or folder until it is closed or the process ends, however it ends.

    Returns:
        False if another process has locked it, None if the system or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def cache_folder() -> Path:
    """Return the user's folder for what can be made again: ``$XDG_CACHE_HOME/micronet`` or ``~/.cache/micronet``.

    A user without a home, as in some containers, has one among the temporary files.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (home if home.is_absolute() else Path("~/.cache").expanduser()) / "micronet"
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"micronet-{os.getuid()}")


def file_hash(path: Path) -> str:
    """Return the SHA-256 in hexadecimal of a file, or of the names and hashes of a folder's files."""
    if path.is_dir():
        found = [f"{each.relative_to(path)} {file_hash(each)}" for each in sorted(files_in(path))]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_size(path: Path) -> int:
    """Return the size in bytes of a file, or of the files in a folder: of one that ``export`` wrote, of its own."""
    if not path.is_dir():
        return path.stat().st_size
    listed = listed_files(path)
    own = {path / name for name in (NOTE, *listed)}  # not what make check left there, for example
    return sum(each.stat().st_size for each in files_in(path) if each in own or not listed)


def listed_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder's note, whether they are whole or not."""
    try:
        return [str(name) for name in parse_json((folder / NOTE).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and in those in it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _follow_links(path: Path) -> Path:
    """Return the file that ``path`` refers to, through symbolic links."""
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, if the system can sync a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
