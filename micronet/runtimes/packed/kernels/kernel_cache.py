"""Compiled code on the disk: one file for each function, its arguments, processor, and version of the sources.

numba's own cache numbers its files, writes an index of them first and each file after it, and takes the numbers of
earlier versions again: a process that reads between the two runs an earlier version's code. Here a name says all that
a file's code depends on, and a file appears whole.
"""

import hashlib
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.serialize import dumps

from micronet.core.files import write_bytes
from micronet.errors import MicronetError

_FILES = sorted(Path(__file__).parents[1].rglob("*.py"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()
SUFFIX = ".code"
DIGEST = hashlib.sha256().digest_size


class Kept:
    """The code of one function, by what it was compiled for; numba calls ``load`` and ``save`` with that as the key.

    folder: numba's own choice, beside the ``.pyc`` files or in the user's cache, never what a user names. Who may write
    there can run code in this process, through those files as through any cache of numba's; the digest only tells whole
    files from damaged ones.
    """

    def __init__(self, folder: Path, function: str) -> None:
        self.folder, self.function = folder, function

    def path(self, key: Any) -> Path:
        """Return where the code for ``key`` lies: (signature, processor, hashes of the function's own bytecode)."""
        told = repr((self.function, key, numba.__version__, sys.implementation.cache_tag))
        return self.folder / f"{SOURCES[:16]}-{hashlib.sha256(told.encode()).hexdigest()[:32]}{SUFFIX}"

    def load(self, key: Any) -> Any:
        """Return what was saved, or None where nothing whole is there."""
        try:
            found = self.path(key).read_bytes()
        except OSError:
            return None
        digest, code = found[:DIGEST], found[DIGEST:]
        return pickle.loads(code) if hashlib.sha256(code).digest() == digest else None  # noqa: S301 - our own, whole

    def save(self, key: Any, data: Any) -> None:
        """Keep code for the next process, in place of that of other versions; where that fails, it compiles again."""
        with suppress(OSError, MicronetError):
            code: bytes = dumps(data)  # type: ignore[no-untyped-call]
            write_bytes(self.path(key), hashlib.sha256(code).digest() + code)
            for path in self.folder.glob(f"*{SUFFIX}"):
                if not path.name.startswith(SOURCES[:16]):
                    path.unlink(missing_ok=True)
