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
    """What was done in a recipe's folder: for each stage the hash of what it was asked, and of what it wrote."""

    path: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """Read a folder's journal; an empty one where there is none, or none that can be read."""
        path = folder / "recipe.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        sound = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
        return cls(path, entries if sound else {})

    def done(self, stage: str, key: str, output: Path) -> bool:
        """Tell whether a stage was finished with this key and its file is still the one it wrote."""
        entry = self.entries.get(stage, {})
        return bool(entry.get("key") == key and output.exists() and entry.get("output") == file_hash(output))

    def owns(self, stage: str) -> bool:
        """Tell whether a stage of this name was begun here before, so that its file may be written anew."""
        return stage in self.entries

    def begun(self, stage: str, key: str) -> bool:
        """Tell whether a stage was begun with this key and not finished."""
        return self.entries.get(stage) == {"key": key}

    def note(self, stage: str, key: str, output: Path | None = None) -> None:
        """Write down that a stage begins, or with ``output`` that it has written that file."""
        self.entries[stage] = {"key": key} if output is None else {"key": key, "output": file_hash(output)}
        text = json.dumps(self.entries, indent=2) + "\n"
        write_text(self.path, text)


def stage_key(command: str, options: Mapping[str, Any], inputs: list[Path], version: str) -> str:
    """Return the hash of all that a stage's result follows from: command, options, input files' bytes, our version.

    A folder among the inputs counts by its name alone.
    """
    files = [file_hash(path) for path in inputs if path.is_file()]
    asked = [version, command, sorted((key, str(value)) for key, value in options.items()), files]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
