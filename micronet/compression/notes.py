"""What a search has found so far, in its folder, so that a search that was killed goes on where it stopped."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.files import write_bytes
from micronet.core.parse import parse_json, read_text
from micronet.errors import MicronetError

FILE = "search.json"
CANDIDATES = "candidates"  # the folder of what was made
BEAT = 10.0  # seconds after which the time of what is being found is written again


@dataclass
class Notes:
    """The results of a search by name, each with the seconds that it took.

    Whatever decides what comes next is noted, measured times too. So a search that goes on decides as it did before.
    With another goal, such as a larger budget, what was measured still holds, and what was decided does not; a search
    that came to its end leaves the next one all of its budget.

    Attributes:
        path: The file.
        key: The hash of all that measurements depend on.
        goal: What is asked for.
        found: The results.
        settled: Seconds of the searches that came to their end.
        lost: Seconds spent on results that were not finished, or that hold for another goal, by their names.
        begun: When the results that are being found were begun, by ``time.monotonic``.
        written: When the file was written, likewise.
    """

    path: Path
    key: str
    goal: str = ""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    settled: float = 0.0
    begun: dict[str, float] = field(default_factory=dict)
    written: float = -math.inf

    @classmethod
    def open(cls, folder: Path, key: str, goal: str = "", *, force: bool = False) -> "Notes":
        """Read a folder's notes, or begin new ones.

        Args:
            folder: The folder of the search.
            key: The hash of all that measurements depend on.
            goal: What is asked for.
            force: Whether to begin anew in a folder with a search with other settings, or with other files.

        Raises:
            MicronetError: The notes are those of a search with other settings, or the folder holds other files.
        """
        path = folder / FILE
        if folder.exists() and not folder.is_dir():
            raise MicronetError(f"{folder} is a file; choose a new name for the folder of the search with -o")
        if not folder.exists() or not any(folder.iterdir()):
            return cls._new(path, key, goal)
        try:
            noted = parse_json(read_text(path))
            found, lost, noted_key, noted_goal = noted["found"], noted["lost"], noted["key"], noted["goal"]
            settled = noted.get("settled", 0.0)
            _check(found, {**lost, "settled": settled})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if force:
                return cls._new(path, key, goal)
            raise cls._unreadable(path, error) from None
        if noted_key == key:
            if noted_goal != goal:
                lost |= {name: each["seconds"] for name, each in found.items() if each["decided"]}
                found = {name: each for name, each in found.items() if not each["decided"]}
            return cls(path, key, goal, found, lost, settled)
        if force or not found:
            shutil.rmtree(folder / CANDIDATES, ignore_errors=True)  # of the other search
            return cls._new(path, key, goal)
        raise MicronetError(
            f"{folder} holds a search with other settings, or of another file; choose another folder with -o, or "
            "add --force to start over"
        )

    @classmethod
    def _new(cls, path: Path, key: str, goal: str) -> "Notes":
        """Begin notes: the file is there before anything else, so that a folder is known as a search's."""
        notes = cls(path, key, goal)
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
        """The seconds that the results took, over all runs since a search came to its end."""
        return self._total() - self.settled

    def settle(self) -> None:
        """Say that the search came to its end."""
        self.settled = self._total()
        self._write()

    def _total(self) -> float:
        unfinished = sum(seconds for name, seconds in self.lost.items() if name not in self.found)
        return float(sum(each["seconds"] for each in self.found.values())) + unfinished

    def once(self, name: str, find: Callable[[], Any], *, decided: bool = False) -> Any:
        """Return a result that is noted, or find it and note it; it is a JSON value.

        ``decided``: whether it depends on the goal.
        """
        if name not in self.found:
            self.begun[name] = time.monotonic()
            try:
                value = find()
            except Exception:
                self.lost = self._lost()
                del self.begun[name]
                self._write()
                raise
            seconds = self._lost()[name]
            del self.begun[name]
            self.found[name] = {"value": value, "seconds": round(seconds, 3), "decided": decided}
            self._write()
        return self.found[name]["value"]

    def decide(self, name: str, find: Callable[[], Any]) -> Any:
        """Return a decision that is noted, or make it and note it."""
        return self.once(name, find, decided=True)

    def beat(self) -> None:
        """Write, now and then, how long what is being found has taken, so that it counts if the process is killed."""
        if self.begun and time.monotonic() - self.written > BEAT:
            self._write()

    def seconds(self, name: str) -> float:
        """Return the seconds that a result took, or that were lost on it."""
        return float(self.found[name]["seconds"] if name in self.found else self.lost.get(name, 0.0))

    def _lost(self) -> dict[str, float]:
        """Return the seconds lost on each result if what is being found ended now."""
        now = time.monotonic()
        return self.lost | {name: self.lost.get(name, 0.0) + now - start for name, start in self.begun.items()}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": self.key, "goal": self.goal, "settled": self.settled}
        content |= {"lost": self._lost(), "found": self.found}
        write_bytes(self.path, f"{json.dumps(content, indent=1)}\n".encode())
        self.written = time.monotonic()


def _check(found: dict[str, dict[str, Any]], lost: dict[str, float]) -> None:
    """Raise ValueError, or what a wrong type raises, unless these are results and seconds."""
    seconds = [*lost.values(), *(each["seconds"] for each in found.values())]
    if not all(0 <= each < math.inf for each in seconds):
        raise ValueError("a time is not one")
    if not all("value" in each and isinstance(each["decided"], bool) for each in found.values()):
        raise ValueError("a result is not one")
