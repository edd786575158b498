"""The ``doctor`` report: what this machine and its packages offer, what will be fast here, and what to install."""

import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from micronet.core import machine
from micronet.core.config import group
from micronet.stages.config import ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

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
        found["advice"] = [{"fast": fast, "text": text} for fast, text in advise(found)]
        return Outcome(found, found)


def advise(found: dict[str, Any]) -> list[tuple[bool, str]]:
    """Return what will be fast on a machine (True) and what will not (False), in words, from what was found of it."""
    packages = {each["name"]: each for each in found["packages"] if each["version"] is not None}
    features, processor = found["processor"]["features"], found["processor"]
    advice = []
    if "AVX2" in features and found["system"].endswith(("x86_64", "AMD64")):
        advice.append(
            (True, "int8 is fast: this processor has 8-bit dot products (VNNI)")
            if features["VNNI"]
            else (False, "int8 saturates on this processor with 8-bit weights, and avoiding that costs a third of its "
                  "speed: use --w-bits 7")
        )  # fmt: skip
    if "BF16" in features:
        advice.append(
            (True, "bf16 training pays here: trainings use it by default (--amp)")
            if features["BF16"]
            else (False, "bf16 would be emulated, so trainings compute in float32")
        )
    if "numba" in packages:
        kernel = packages["numba"].get("kernel", "portable")
        advice.append((kernel != "portable", f"packed networks run on {kernel} kernels"))
    else:
        advice.append((False, "packed networks run in numpy, which is slow"))
    advice += _advise_on_gpu(packages.get("torch", {}))
    if found["compilers"]["cc"] is None:
        advice.append((False, "export --target c needs a C compiler: install one (apt install gcc) or set CC"))
    if found["kernel_cache"]["problem"]:
        advice.append((False, f"packed networks are compiled at each start: {found['kernel_cache']['problem']}"))
    if processor["threads"] > processor["cores"]:
        advice.append(
            (False, f"OMP_NUM_THREADS is {processor['threads']}, but only {processor['cores']} cores are usable")
        )
    if found["memory"]["free_bytes"] < LEAST_FREE:
        advice.append((False, "less than 2 GiB of memory are free; training may need more"))
    return advice


def _advise_on_gpu(torch: dict[str, Any]) -> list[tuple[bool, str]]:
    if torch.get("gpus"):
        return [(True, f"training runs on {torch['gpus'][0]} (--device cuda)")]
    if shutil.which("nvidia-smi") is None:
        return [(False, "no GPU: training takes hours where a GPU takes minutes, and trt-eval runs no engine")]
    why = "torch does not find it" if torch.get("cuda") else "torch is a build for processors alone"
    return [(False, f"there is an NVIDIA GPU, but {why}; install torch for CUDA from https://pytorch.org")]
