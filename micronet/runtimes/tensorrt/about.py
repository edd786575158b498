"""What the JSON beside an engine tells, held against the engine and the library that is here."""

import json
from pathlib import Path
from typing import Any

from micronet.core.files import file_hash
from micronet.errors import FailedError, MicronetError
from micronet.runtimes.tensorrt.library import library

REBUILD = "build it again with micronet trt-build"
TOLD = ("backend", "version", "engine_sha256")  # what nothing can be done without


def read_about(path: Path) -> dict[str, Any]:
    """Read the JSON beside an engine. Raises MicronetError where either is missing, damaged or of another engine."""
    if not path.exists():
        raise MicronetError(f"{path} does not exist; make it with micronet trt-build")
    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        raise MicronetError(f"{path} lacks {beside.name} beside it, which tells what it is; copy both, or {REBUILD}")
    try:
        about = json.loads(beside.read_bytes())
    except ValueError:
        about = None
    if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in TOLD):
        raise MicronetError(f"{beside} is damaged; {REBUILD}")
    if about["engine_sha256"] != file_hash(path):
        raise MicronetError(f"{path} is not the engine that {beside.name} tells of: damaged or exchanged; {REBUILD}")
    return about


def library_of(path: Path, about: dict[str, Any]) -> Any:
    """Import the library that made an engine. Raises FailedError where it is missing or of another version."""
    trt = library(about["backend"])
    if trt.__version__ != about["version"]:
        made, here = f"{about['backend']} {about['version']}", trt.__version__
        raise FailedError(f"{path} was made by {made}, here is {here}, and engines fit one version alone; {REBUILD}")
    return trt
