"""The ``doctor`` report: what this machine and its packages offer, what will be fast here, and what to install."""

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from micronet.core import machine
from micronet.core.config import group
from micronet.stages.config import ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

X86 = ("x86_64", "AMD64")  # what systems call it
LEAST_FREE = 2 << 30  # bytes, for torch and a small network


@dataclass(frozen=True)
class Doctor(Stage):
    """Examines the machine."""

    name = "doctor"
    details = (
        "Every package is imported in a process of its own, so that a broken one is named and breaks nothing. Nothing "
        "is written."
    )
    example = "micronet doctor --json"
    suffix = None
    product = "dict[str, object]"

    report: ReportConfig = group(ReportConfig)

    def input(self) -> None:
        """Return None: no file is read."""

    def run(self, context: Context) -> Outcome:
        """Examine the machine and the packages."""
        from micronet.stages.installed import compilers, examine, kernel_cache

        context.progress.step("importing packages", 0, 1)
        packages = examine()
        found: dict[str, Any] = {
            "micronet": machine.version(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "executable": sys.executable,
            "processor": {
                "name": machine.processor_name(),
                "cores": machine.usable_cores(),
                "threads": machine.usable_threads(),
                "features": machine.processor_features(),
            },
            "memory": {"total_bytes": machine.total_memory(), "free_bytes": machine.available_memory()},
            "packages": packages,
            "compilers": compilers(),
            "kernel_cache": kernel_cache(),
        }
        found["advice"] = [each._asdict() for each in advise(found)]
        return Outcome(found, found)


class Advice(NamedTuple):
    """What will be fast on a machine, or will not."""

    topic: str
    fast: bool
    text: str


def advise(found: dict[str, Any]) -> list[Advice]:
    """Return what will be fast on a machine and what will not, from what was found of it."""
    packages = {each["name"]: each for each in found["packages"] if each["version"] is not None}
    processor, problem = found["processor"], found["kernel_cache"]["problem"]
    advice = [*_advise_on_processor(processor["features"], found["system"]), *_advise_on_gpu(packages.get("torch", {}))]
    kernel = packages["numba"].get("kernel", "portable") if "numba" in packages else None
    runs = f"networks run on {kernel} kernels" if kernel else "networks run in numpy, which is slow: install numba"
    advice.append(Advice("packed", kernel not in (None, "portable"), runs))
    if problem:
        advice.append(Advice("packed", False, f"networks are compiled at each start: {problem}"))
    if found["compilers"]["cc"] is None:
        advice.append(Advice("C", False, "export --target c needs a compiler: install one (apt install gcc) or set CC"))
    if processor["threads"] > processor["cores"]:
        text = f"OMP_NUM_THREADS is {processor['threads']}, but only {processor['cores']} cores are usable"
        advice.append(Advice("threads", False, text))
    if found["memory"]["free_bytes"] < LEAST_FREE:
        advice.append(Advice("memory", False, "less than 2 GiB are free; training may need more"))
    return advice


def _advise_on_processor(features: dict[str, bool], system: str) -> Iterator[Advice]:
    if "VNNI" in features and system.endswith(X86):
        slow = (
            "saturates on this processor with 8-bit weights; to avoid that costs a third of its speed: use --w-bits 7"
        )
        yield Advice("int8", features["VNNI"], "8-bit dot products (VNNI)" if features["VNNI"] else slow)
    if "BF16" in features:
        pays, slow = "training pays here, and is the default (--amp)", "would be emulated; trainings compute in float32"
        yield Advice("bf16", features["BF16"], pays if features["BF16"] else slow)


def _advise_on_gpu(torch: dict[str, Any]) -> Iterator[Advice]:
    why = "torch does not find it" if torch.get("cuda") else "torch is a build for processors alone"
    if torch.get("gpus"):
        yield Advice("GPU", True, f"training runs on {torch['gpus'][0]} (--device cuda)")
    elif shutil.which("nvidia-smi") is None:
        yield Advice("GPU", False, "there is none: training takes hours where it takes minutes; trt-eval needs one")
    else:
        yield Advice("GPU", False, f"there is one, but {why}; install torch for CUDA from https://pytorch.org")
