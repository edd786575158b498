"""Compiled kernels on disk: one file per function, signature, processor and version of the sources.

numba's own cache writes an index first and the numbered code files after it, and reuses the numbers of earlier
versions, so a process that reads in between runs an earlier version's code. It also ignores changes in the modules that
a function calls. Here the file name is a hash of everything that the code depends on, and each file is written at once.
"""

import hashlib
import os
import pickle
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numba
from numba.core.serialize import dumps

from micronet.core.files import cache_folder, write_bytes
from micronet.errors import MicronetError
from micronet.runtimes.packed.kernels.cpu import INSTRUCTION_SET

_FILES = sorted(Path(__file__).parents[1].rglob("*.py"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()
SUFFIX = ".code"
UNUSED_SECONDS = 30 * 24 * 3600  # after which code of another version is deleted
DIGEST_BYTES = hashlib.sha256().digest_size


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with numba, without the GIL and Python's division checks, and cache the code on disk."""
    compiled = cast("Callable[..., Any]", numba.njit(nogil=True, error_model="numpy")(function))
    with suppress(RuntimeError):  # compile_kernels calls enable_cache again and reports it
        enable_cache(compiled)
    return compiled


def enable_cache(compiled: Any) -> None:
    """Make numba cache a function in a KernelCache. Raises RuntimeError if numba finds no writable folder."""
    compiled.enable_caching()
    # Private: numba has no option to replace its store. tests/runtimes/test_kernel_cache.py checks the attributes.
    cache = compiled._cache
    if hasattr(cache, "_cache_file"):
        function = compiled.py_func
        cache._cache_file = KernelCache(_folder(), f"{function.__module__}.{function.__qualname__}")
    else:
        cache.disable()


def why_not_kept() -> str | None:
    """Return why compiled code cannot be kept on disk, or None if it can."""
    folder = _folder()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
            return None
    return f"{folder} is not a folder that this user, and nobody else, can write to"


class KernelCache:
    """The compiled code of one function, by signature. numba calls ``load`` and ``save``.

    folder: created if it is missing. The files are pickles, which run code, so one is only read if it and its folder
        belong to this user and nobody else may write them; the digest detects damaged files.
    """

    def __init__(self, folder: Path, function: str) -> None:
        self.folder, self.function = folder, function

    def path(self, key: Any) -> Path:
        """Return the file for a key of numba's: (signature, processor, hashes of the function's bytecode)."""
        name = repr((self.function, key, INSTRUCTION_SET, numba.__version__, sys.implementation.cache_tag))
        return self.folder / f"{SOURCES[:16]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}{SUFFIX}"

    def load(self, key: Any) -> Any:
        """Return the saved code, or None if its file is missing or damaged."""
        with suppress(OSError):
            path = self.path(key)
            if not (_is_private(self.folder, stat.S_ISDIR) and _is_private(path, stat.S_ISREG)):
                return None
            data = path.read_bytes()
            digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                return pickle.loads(code)  # noqa: S301 - only this user can have written it, and it is whole
        return None

    def save(self, key: Any, data: Any) -> None:
        """Save code and delete old code of other versions; if the folder is not writable, do nothing."""
        with suppress(OSError, MicronetError):
            # Private: numba's pickler handles what the standard one cannot. The same test checks it.
            code: bytes = dumps(data)  # type: ignore[no-untyped-call]
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.path(key)
            write_bytes(path, hashlib.sha256(code).digest() + code)
            path.chmod(0o600)
            for other in self.folder.glob(f"*{SUFFIX}"):
                if not other.name.startswith(SOURCES[:16]) and time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                    other.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "kernels"


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Return True if a path is of a kind, no link, and only its owner, this user, may write to it."""
    status = path.lstat()
    owner = os.geteuid() if hasattr(os, "geteuid") else status.st_uid
    return kind(status.st_mode) and status.st_uid == owner and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
