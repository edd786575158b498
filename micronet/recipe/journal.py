"""What was done in a recipe's folder, so that unchanged stages are skipped and interrupted ones continue."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.files import file_hash, write_text


@dataclass
class Journal:
    """The state of a recipe's folder: for each stage the hash of its settings and inputs, and of its output."""

    path: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """Read a folder's journal; return an empty one if there is none or it cannot be read."""
        path = folder / "recipe.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        sound = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
        return cls(path, entries if sound else {})

    def done(self, stage: str, key: str, output: Path) -> bool:
        """Return True if a stage finished with this key and its file has not changed since."""
        entry = self.entries.get(stage, {})
        return bool(entry.get("key") == key and output.exists() and entry.get("output") == file_hash(output))

    def owns(self, stage: str) -> bool:
        """Return True if a stage of this name ran here before, so its file may be overwritten."""
        return stage in self.entries

    def begun(self, stage: str, key: str) -> bool:
        """Return True if a stage began with this key and did not finish."""
        return self.entries.get(stage) == {"key": key}

    def note(self, stage: str, key: str, output: Path | None = None) -> None:
        """Record that a stage begins or, with ``output``, that it has written that file."""
        self.entries[stage] = {"key": key} if output is None else {"key": key, "output": file_hash(output)}
        text = json.dumps(self.entries, indent=2) + "\n"
        write_text(self.path, text)


def stage_key(command: str, options: Mapping[str, Any], inputs: list[Path], version: str) -> str:
    """Return the hash of all that a stage's result depends on: command, settings, input files, micronet's version.

    A folder among the inputs counts by its name only.
    """
    files = [file_hash(path) for path in inputs if path.is_file()]
    request = [version, command, sorted((key, str(value)) for key, value in options.items()), files]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
