"""Read the JSON file beside an engine, and check it against the engine and the installed library."""

import json
from pathlib import Path
from typing import Any

from micronet.core.files import file_hash
from micronet.errors import FailedError, MicronetError
from micronet.runtimes.tensorrt.library import library

REBUILD = "build it again with micronet trt-build"
REQUIRED = ("backend", "version", "engine_sha256")  # strings without which an engine cannot be run


def read_about(path: Path) -> dict[str, Any]:
    """Read an engine's JSON file; raise MicronetError if either file is missing or damaged, or if they do not match."""
    if not path.exists():
        raise MicronetError(f"{path} does not exist; make it with micronet trt-build")
    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        raise MicronetError(f"{path} needs its description {beside.name} beside it; copy both files, or {REBUILD}")
    try:
        about = json.loads(beside.read_bytes())
    except ValueError:
        about = None
    if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in REQUIRED):
        raise MicronetError(f"{beside} is damaged; {REBUILD}")
    if about["engine_sha256"] != file_hash(path):
        raise MicronetError(f"{path} does not match {beside.name}: one of them is damaged or was replaced; {REBUILD}")
    return about


def library_of(path: Path, about: dict[str, Any]) -> Any:
    """Import the library that built an engine; raise FailedError if it is missing or its version differs."""
    trt = library(about["backend"])
    if trt.__version__ != about["version"]:
        raise FailedError(
            f"{path} was built by {about['backend']} {about['version']}, but {trt.__version__} is installed; an engine "
            f"only runs with the version that built it; {REBUILD}"
        )
    return trt
