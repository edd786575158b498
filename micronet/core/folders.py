"""Folders that ``export`` writes: whole or not at all, with a note that says what is in them."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from micronet.core.files import (
    NOTE,
    check_writable,
    file_hash,
    files_in,
    leftovers,
    listed_files,
    temporary_folder,
    write_bytes,
)
from micronet.core.parse import parse_json
from micronet.errors import FailedError, MicronetError

FORMAT = 1
OLD = "old"  # the earlier folder, while the new one takes its place
LARGEST_NOTE = 64 * 2**20


class Folder(NamedTuple):
    """A folder in memory."""

    files: Mapping[str, bytes]  # by their paths in it
    note: Mapping[str, Any]  # JSON values

    def __repr__(self) -> str:
        """Name the files, without their bytes."""
        return f"Folder({', '.join(f'{path} ({len(data):,} bytes)' for path, data in self.files.items())})"


def check_output_folder(path: Path, *, force: bool) -> None:
    """Raise MicronetError if no folder can be written at ``path``, or something is there that must stay.

    An earlier folder that a process was killed in replacing is put back.
    """
    for killed in () if path.exists() else path.parent.glob(f"{leftovers(path)}/{OLD}"):
        with suppress(OSError):
            killed.rename(path)
    if not path.is_dir():
        check_writable(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise MicronetError(f"{path} is a file, but this target writes a folder; choose another name with -o")
    if any(path.iterdir()):
        if not (path / NOTE).is_file():
            raise MicronetError(
                f"{path} is a folder with other files, which would be lost; choose a new name with -o, for example "
                f"{path / 'exported'}"
            )
        if not force:
            raise MicronetError(f"{path} already exists; add --force to overwrite it, or choose another name with -o")
        listed = {path / name for name in (NOTE, *listed_files(path))}
        if added := sorted(set(files_in(path)) - listed):
            raise MicronetError(
                f"{path} also has files that micronet export did not write, such as {added[0]}; move them, or choose "
                "another name with -o"
            )


def write_folder(path: Path, folder: Folder) -> None:
    """Write a folder, with the sizes and hashes of its files in its note; replace one that ``export`` wrote there.

    Raises:
        FailedError: The system refused, for example because the disk is full. An earlier folder is then unchanged.
        MicronetError: Something else is at ``path``.
    """
    check_output_folder(path, force=True)
    files, note = folder
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    text = json.dumps({"format": FORMAT, **note, "files": listed}, indent=1, sort_keys=True)
    try:
        with temporary_folder(beside=path, keep=OLD) as temporary:
            new = temporary / "new"
            for name, content in {**files, NOTE: text.encode()}.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(new / name, content)
            if path.is_dir():
                path.rename(temporary / OLD)
            try:
                new.rename(path)
            except OSError:
                with suppress(OSError):
                    (temporary / OLD).rename(path)
                raise
    except OSError as error:
        raise FailedError(f"{path} could not be written ({error.strerror or error})") from error


def read_note(folder: Path) -> dict[str, Any]:
    """Return the note of a folder that ``export`` wrote.

    Raises MicronetError if it is another folder, or a file in it is missing or not as it was written.
    """
    place = folder / NOTE
    if not place.is_file():
        raise MicronetError(f"{folder} is a folder, but not one that micronet export wrote; specify a file in it")
    try:
        note: Any = parse_json(place.read_text()) if place.stat().st_size <= LARGEST_NOTE else None
        files, target = note["files"], note["target"]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise MicronetError(f"{place} is corrupted ({error}); export the network again") from error
    if not isinstance(note, dict) or not isinstance(files, dict) or not isinstance(target, str):
        raise MicronetError(f"{place} is corrupted; export the network again")
    if note.get("format") != FORMAT:
        raise MicronetError(
            f"{folder} has a format that this version does not know; run pip install -U micronet-compress"
        )
    for name, stored in files.items():
        if not _is_whole(folder, name, stored):
            raise MicronetError(f"{name!r} in {folder} is not the file that was written; export the network again")
    return dict(note)


def _is_whole(folder: Path, name: str, stored: Any) -> bool:
    """Return True if a file is in a folder itself, and of the size and hash that are stored."""
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
        return inside and path.stat().st_size == stored["bytes"] and file_hash(path) == stored["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
