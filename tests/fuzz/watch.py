"""Notice what a command runs, loads, unpickles and changes outside its folder, by Python's audit events (PEP 578)."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from micronet.core.files import cache_folder

PROGRAMS = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn",
    "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "webbrowser.open",
}  # fmt: skip
# The event of a change -> which of its arguments are paths.
CHANGES = {
    "os.remove": [0], "os.rename": [0, 1], "os.rmdir": [0], "os.mkdir": [0], "os.symlink": [1], "os.link": [1],
    "os.truncate": [0], "os.chmod": [0], "os.chown": [0], "os.utime": [0],
}  # fmt: skip
# Its own processes, and pickles from folders of the user's own: the processes of a data loader, compiled kernels.
TRUSTED = ("/multiprocessing/", "/torch/utils/data/", "/numba/")
# Files in the working directory that Python and libraries would run or read if that were where they look.
TRAPS = {
    "typer.py": "raise SystemExit", "torch.py": "raise SystemExit", "numba.py": "raise SystemExit",
    "matplotlib.py": "raise SystemExit", "sitecustomize.py": "raise SystemExit", "usercustomize.py": "raise SystemExit",
    "setup.cfg": "[options]\n", ".numba_config.yaml": "cache_dir: ./evil\n", "matplotlibrc": "backend: evil\n",
    "libgomp.so.1": "", "pyvenv.cfg": "home = .\n", ".env": "PYTHONPATH=.\n",
}  # fmt: skip
OWN = [str(Path.home() / place / "matplotlib") for place in (".config", ".cache")]  # which matplotlib makes for itself
_seen: list[str] | None = None  # None: nobody watches
_places: tuple[str, list[str] | None] = ("", None)  # the folder, and where it may write; None: anywhere
_installed = False


@contextmanager
def watched(arguments: list[str]) -> Iterator[list[str]]:
    """Collect the events of this context: what ran, and what it changed outside the working directory and the cache."""
    global _seen, _places, _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_notice)
    folder, kept = str(Path.cwd()), tempfile.tempdir
    Path("scratch").mkdir(exist_ok=True)
    asked = any(word.rpartition("=")[2].startswith(("/", "..")) for word in arguments if "=" in word)
    _places = folder, None if asked else [folder, os.path.realpath(cache_folder()), "/dev/null", "/dev/shm", *OWN]
    tempfile.tempdir, _seen = f"{folder}/scratch", []
    try:
        yield _seen
    finally:
        _seen, tempfile.tempdir = None, kept


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in PROGRAMS:
        if event != "os.fork" or not _is_trusted():
            _seen.append(event)
    elif event == "pickle.find_class":
        if not _is_trusted():
            _seen.append(f"{event} {arguments[-2]}.{arguments[-1]}")
    elif event in ("exec", "compile", "ctypes.dlopen", "import"):
        about = arguments[1] if event in ("compile", "import") else arguments[0]
        about = getattr(about, "co_filename", about)
        named = isinstance(about, str | bytes | os.PathLike) and not os.fsdecode(about).startswith("<")
        if named and os.sep in os.fsdecode(about) and _is_inside(about):
            _seen.append(f"{event} {os.fsdecode(about)}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or path is None:
            return
        if Path(os.fsdecode(path)).name in TRAPS and _is_inside(path):
            _seen.append(f"open {os.fsdecode(path)}")
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check_change(event, path)
    elif event in CHANGES:
        for index in CHANGES[event]:
            _check_change(event, arguments[index])


def _check_change(event: str, path: Any) -> None:
    allowed = _places[1]
    if _seen is not None and allowed is not None and not isinstance(path, int):
        real = os.path.realpath(path)
        if not any(real == place or real.startswith(place + os.sep) for place in allowed):
            _seen.append(f"{event} {os.fsdecode(path)}")


def _is_inside(path: Any) -> bool:
    return os.path.realpath(os.fsdecode(path)).startswith(_places[0] + os.sep)


def _is_trusted() -> bool:
    """Return True if trusted code asks for it: a caller, however far up."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in TRUSTED):
            return True
        frame = frame.f_back
    return False
