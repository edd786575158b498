"""What is installed: packages, imported in a process of their own; C compilers; the folder of compiled kernels."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from micronet.core.files import cache_folder
from micronet.core.machine import DISTRIBUTION, words_in
from micronet.errors import MicronetError

PROBE = Path(__file__).with_name("package_probe.py")
IMPORT_SECONDS = 120
AARCH64 = "aarch64-linux-gnu-gcc"


class Package(NamedTuple):
    """A package: its module, its distribution, what it is for, and the extra of pyproject.toml that installs it."""

    module: str
    distribution: str
    purpose: str
    extra: str | None = None

    @property
    def install(self) -> str:
        """The command line that installs it."""
        wanted = f"'{DISTRIBUTION}[{self.extra}]'" if self.extra else self.distribution
        return f"pip install {wanted}"


PACKAGES = (
    Package("torch", "torch", "training, pruning and quantization"),
    Package("torchvision", "torchvision", "its networks and data sets"),
    Package("onnx", "onnx", "ONNX files"),
    Package("onnxruntime", "onnxruntime", "running ONNX files"),
    Package("numba", "numba", "fast packed networks", "fast"),
    Package("openvino", "openvino", "export --target openvino", "openvino"),
    Package("ncnn", "ncnn", "running export --target ncnn", "ncnn"),
    Package("tensorrt_rtx", "tensorrt-rtx-cu13", "trt-build without a GPU", "tensorrt-rtx"),
    Package("tensorrt", "tensorrt", "trt-build on an NVIDIA GPU", "tensorrt"),
    Package("pycuda", "pycuda", "trt-eval on an NVIDIA GPU", "tensorrt"),
    Package("matplotlib", "matplotlib", "--plot", "plot"),
)


def examine(packages: tuple[Package, ...] = PACKAGES) -> list[dict[str, Any]]:
    """Import every package that is there, in another process.

    Returns:
        For each its ``name``, ``purpose`` and ``install`` line; ``version``, or None if it is missing or broken;
        ``problem``, if it is broken; and what ``package_probe`` finds.
    """
    there = [each.module for each in packages if _is_there(each.module)]
    found = _import_all(there)
    rows = []
    for each in packages:
        about = found.get(each.module, {})
        row = {"name": each.module, "purpose": each.purpose, "install": each.install, "version": None, **about}
        if "problem" in about:
            row["install"] = each.install.replace("install", "install --force-reinstall", 1)
        elif each.module in there and not row["version"]:
            row["version"] = "unknown"
            with suppress(PackageNotFoundError):
                row["version"] = version(each.distribution)
        rows.append(row)
    return rows


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return what the probe says of each package; one that ends its process is named, and the others come after it."""
    found: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in found]:
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(PROBE), *left],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_SECONDS, check=False,
            )  # fmt: skip
            text, why = done.stdout, _ended(done.returncode)
        except subprocess.TimeoutExpired as late:
            text, why = late.stdout or b"", f"importing it takes more than {IMPORT_SECONDS} seconds"
        except OSError as error:
            return found | {name: {"problem": f"Python could not be started ({error.strerror})"} for name in left}
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                about = json.loads(line)
                found[about["name"]] = {key: value for key, value in about.items() if key != "name"}
        if stopped := next((name for name in left if name not in found), None):
            found[stopped] = {"problem": why}
    return found


def _ended(code: int) -> str:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"importing it ends Python ({name})"


def compilers() -> dict[str, str | None]:
    """Return the first line that each C compiler says of its version, or None: the user's, and one for 64-bit Arm."""
    own = ["cc"]
    with suppress(MicronetError):
        own = words_in("CC") or own
    return {"cc": _version_line(own[0]), "aarch64": _version_line(AARCH64)}


def _version_line(command: str) -> str | None:
    if shutil.which(command) is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=True)
        return (done.stdout.splitlines() or [command])[0]
    return None


def kernel_cache() -> dict[str, Any]:
    """Return the folder of compiled kernels, and why they cannot be kept there, if so. Makes no folder."""
    folder = cache_folder() / "kernels"
    place = next(path for path in (folder, *folder.parents) if path.exists())
    problem = ""
    if not place.is_dir() or not os.access(place, os.W_OK):
        problem = f"{place} cannot be written"
    elif place == folder and folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"others can write to {folder}"
    return {"folder": str(folder), "writable": not problem, "problem": problem}
