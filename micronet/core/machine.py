"""The machine a command runs on: which device, how memory is given out, and what to write beside a measurement."""

import ctypes
import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

# glibc's mallopt parameters (malloc.h) and values that keep a training step's buffers instead of returning them.
_MALLOPT = {
    -4: 0,  # M_MMAP_MAX: no block comes from mmap, whose pages would be faulted in anew at every step
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: freed memory stays with the process
    -2: 256 << 20,  # M_TOP_PAD: grow in large pieces
}

_MEMORY_WHERE_UNTOLD = 4 << 30  # bytes, on systems without /proc/meminfo
_CGROUP = Path("/sys/fs/cgroup")


@cache
def has_vnni() -> bool:
    """Tell whether the processor multiplies 8-bit numbers into 32-bit sums (VNNI); False where it does not tell."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return re.search(r"^flags\s*:.*\b(avx512_vnni|avx_vnni)\b", flags, re.MULTILINE) is not None


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """Return how many threads to compute with: what OMP_NUM_THREADS says, or one a core."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": of nested regions; the outer counts
    return int(said) if said.isdigit() and int(said) > 0 else usable_cores()


def available_memory() -> int:
    """Return the bytes that can still be had: of the machine or, where that is less, of this container."""
    machine = _MEMORY_WHERE_UNTOLD
    with suppress(OSError, IndexError):
        machine = int(re.findall(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    with suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        machine = min(machine, limit - used)
    return max(0, machine)


def tune_allocator() -> None:
    """Make glibc keep freed memory; page faults otherwise take a quarter to a half of a CPU training step.

    Does nothing on other C libraries, or where ``MICRONET_MALLOC=default`` asks for it.
    """
    if os.environ.get("MICRONET_MALLOC") == "default" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def memory_mib() -> int:
    """Return how much memory this process holds, in MiB; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def describe_machine() -> dict[str, str | int]:
    """Return the processor's name, its cores, torch's threads and the GPU if there is one."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "vnni": has_vnni(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # not a user's path
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
