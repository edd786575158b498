"""What a search has found so far, in its folder, so that a search that was killed goes on where it stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.files import write_bytes
from micronet.core.parse import parse_json, read_text
from micronet.errors import MicronetError

FILE = "search.json"


@dataclass
class Notes:
    """The results of a search by name, each with the seconds that it took.

    Whatever decides what comes next is noted, measured times too. So a search that goes on decides as it did before.
    """

    path: Path
    key: str
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, key: str, *, force: bool = False) -> "Notes":
        """Read a folder's notes, or begin new ones.

        Args:
            folder: The folder of the search.
            key: The hash of all that the search depends on.
            force: Whether to begin anew in a folder with a search with other settings, or with other files.

        Raises:
            MicronetError: The notes are those of a search with other settings, or the folder holds other files.
        """
        path = folder / FILE
        if not folder.exists() or not any(folder.iterdir()):
            return cls._new(path, key)
        try:
            noted = parse_json(read_text(path))
            found, noted_key = noted["found"], noted["key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if force:
                return cls._new(path, key)
            raise cls._unreadable(path, error) from None
        if noted_key == key:
            return cls(path, key, found)
        if force or not found:
            return cls._new(path, key)
        raise MicronetError(
            f"{folder} holds a search with other settings, or of another file; choose another folder with -o, or "
            "add --force to start over"
        )

    @classmethod
    def _new(cls, path: Path, key: str) -> "Notes":
        """Begin notes: the file is there before anything else, so that a folder is known as a search's."""
        notes = cls(path, key)
        notes._write()
        return notes

    @staticmethod
    def _unreadable(path: Path, error: Exception) -> MicronetError:
        """Return the error for a folder without notes, or with damaged ones."""
        if isinstance(error, FileNotFoundError):
            return MicronetError(
                f"{path.parent} is a folder with other files; choose a new name with -o, or add --force to write among "
                "them"
            )
        return MicronetError(f"{path} is corrupted; add --force to start over")

    @property
    def spent(self) -> float:
        """The seconds that the results took, over all runs."""
        return float(sum(each["seconds"] for each in self.found.values()))

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Return a result that is noted, or find it and note it; it is a JSON value."""
        if name not in self.found:
            start = time.monotonic()
            value = find()
            self.found[name] = {"value": value, "seconds": round(time.monotonic() - start, 3)}
            self._write()
        return self.found[name]["value"]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": self.key, "found": self.found}
        write_bytes(self.path, f"{json.dumps(content, indent=1)}\n".encode())

    def seconds(self, name: str) -> float:
        """Return the seconds that a noted result took."""
        return float(self.found[name]["seconds"])
