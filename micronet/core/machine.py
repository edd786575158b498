"""What runs a command: the machine's processor, cores, memory and allocator, and micronet's version. No torch here."""

import ctypes
import os
import platform
import re
import shlex
import signal
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from micronet.errors import MicronetError

DISTRIBUTION = "micronet-compress"  # on PyPI, micronet is the project of 2021
# glibc's mallopt parameters (malloc.h), with values that keep a training step's buffers in the process.
_MALLOPT = {
    -4: 0,  # M_MMAP_MAX: never use mmap, whose pages would cause faults again in every step
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: never return freed memory
    -2: 256 << 20,  # M_TOP_PAD: grow in large pieces
}

# What networks gain from, by the words of /proc/cpuinfo on x86 and Arm.
FEATURES = {
    "AVX2": {"avx2"}, "AVX-512": {"avx512f"}, "VNNI": {"avx512_vnni", "avx_vnni"},
    "BF16": {"avx512_bf16", "amx_bf16", "bf16"}, "AMX": {"amx_tile"}, "NEON": {"asimd", "neon"},
}  # fmt: skip
_PR_SET_PDEATHSIG = 1  # prctl.h: the signal sent when the parent dies
_ASSUMED_MEMORY_BYTES = 4 << 30  # on systems without /proc/meminfo
_CGROUP = Path("/sys/fs/cgroup")


def version() -> str:
    """Return the installed version, or 0 in a tree that is not installed."""
    try:
        return metadata(DISTRIBUTION)["Version"]
    except PackageNotFoundError:
        return "0"


def has_vnni() -> bool:
    """Return True if the processor has 8-bit dot products (VNNI); False if that is unknown."""
    return processor_features().get("VNNI", False)


def has_bf16() -> bool:
    """Return True if the processor computes in bfloat16 (AVX-512 BF16, AMX, or Arm's); False if that is unknown."""
    return processor_features().get("BF16", False)


def processor_features() -> dict[str, bool]:
    """Return which of FEATURES the processor has, by name; nothing if the system does not say."""
    if platform.machine() == "arm64":  # macOS, which has no list
        return {"NEON": True}
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    own = set(found[1].split()) if found else set()
    return {name: not flags.isdisjoint(own) for name, flags in FEATURES.items()} if own else {}


def words_in(variable: str) -> list[str]:
    """Return the words of an environment variable, as shells split them. Raises MicronetError if a quote is open."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise MicronetError(f"the environment variable {variable} is invalid: {error}") from None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """Return the number of threads to compute with: OMP_NUM_THREADS, or one per core."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" is for nested regions, outer first
    return int(text) if text.isdigit() and int(text) > 0 else usable_cores()


def available_memory() -> int:
    """Return the bytes of free memory of the machine, or of this container if it has less.

    A container's memory in use includes files that its system keeps in memory; those not read lately make room.
    """
    machine = _ASSUMED_MEMORY_BYTES
    with suppress(OSError, IndexError):
        machine = int(re.findall(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    with suppress(OSError, ValueError):  # "max" means no limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
        machine = min(machine, limit - used + (int(kept[1]) if kept else 0))
    return max(0, machine)


def total_memory() -> int:
    """Return the bytes of memory of the machine, or 0 if unknown."""
    with suppress(OSError, IndexError):
        return int(re.findall(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    return 0


def tune_allocator() -> None:
    """Make glibc keep freed memory; otherwise page faults take a quarter to a half of a training step on a CPU.

    Does nothing with other C libraries, or if ``MICRONET_MALLOC=default`` is set.
    """
    if os.environ.get("MICRONET_MALLOC") == "default" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def end_with_parent() -> None:
    """Let the system kill this process when its parent dies, however it dies; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_mib() -> int:
    """Return the resident memory of this process in MiB, or 0 if unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return 0


def processor_name() -> str:
    """Return the processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def _cpuinfo() -> str:
    """Return Linux's description of the processors; empty on other systems."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(errors="replace")
    return ""
