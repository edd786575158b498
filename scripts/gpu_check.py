"""Check on a GPU that micronet computes what it computes on the CPU; takes less than ten minutes.

    scripts/gpu_check                  the first CUDA device
    scripts/gpu_check --device cuda:1
    scripts/gpu_check --device mock    the test device made of CPU memory, to the last bit
    scripts/gpu_check --only qat       the rows whose names contain "qat"

Every check of tests/devices runs on the CPU and on the device. Then come mixed precision, torch.compile, two processes
if there are two GPUs, and a TensorRT engine if the library is installed. A table shows each row's largest relative
difference and the tolerance (explained in tests/devices/table.py). The exit code is 1 if a row fails or differs.

The CUDA part was written on a machine without a GPU and has not run on one yet.
"""

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import micronet
from micronet.models.device import pick_device
from micronet.quantization.calibrate import calibrate, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.training import distributed
from micronet.training.config import TrainHooks
from tests.devices import mock
from tests.devices.network import QUICK, batches, fit, trained
from tests.devices.table import CPU, FLOAT, HALF, LEVEL, Check, Outcome, all_checks, changed, difference

ROOT = Path(__file__).parents[1]
Result = tuple[float, float]  # a relative difference, and its tolerance
TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # a back end's name -> its module


class SkippedError(Exception):
    """A check that this machine cannot run."""


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--as-rank", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device == mock.NAME:
        mock.register()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # TF32 has 10 bits of precision
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is then deterministic, as resuming needs
    torch.use_deterministic_algorithms(True, warn_only=True)
    if options.as_rank is not None:
        return train_as_rank(options.device, options.as_rank)
    device = pick_device(options.device)
    print(f"torch {torch.__version__}  {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}\n")
    jobs = {name: partial(compare, check, device) for name, check in all_checks().items()} | extra_jobs(device)
    chosen = {name: job for name, job in jobs.items() if options.only in name}
    print(f"{'check':32}{'result':10}{'difference':>12}{'tolerance':>12}{'seconds':>9}")
    failed = [name for name, job in chosen.items() if not show(name, job)]
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} ok" + (f"; not ok: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not chosen else 0


def show(name: str, job: Callable[[], Result]) -> bool:
    """Run a job and print its row; return False if it failed or its numbers differ."""
    start, note = time.perf_counter(), ""
    found, tolerance = float("nan"), float("nan")
    try:
        found, tolerance = job()
        verdict = "ok" if found <= tolerance else "DIFFERS"
    except SkippedError as reason:
        verdict, note = "skipped", f"  {reason}"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        verdict, note = "FAILED", f"  {type(error).__name__}: {lines[0]}"
    seconds = time.perf_counter() - start
    print(f"{name:32}{verdict:10}{found:12.1e}{tolerance:12.1e}{seconds:9.1f}{note}", flush=True)
    return verdict in ("ok", "skipped")


def compare(check: Check, device: torch.device) -> Result:
    """Return the difference of a device's numbers from the CPU's."""
    if device.type == "cpu" and check.tolerance is None:
        raise SkippedError("needs another device than the CPU")
    found = check.run(device)
    if check.tolerance is None:
        return 0.0, 0.0
    reference = check.run(CPU)
    if device.type == mock.NAME:
        return float(len(changed(found, reference))), 0.0
    return difference(found, reference), check.tolerance


def extra_jobs(device: torch.device) -> dict[str, Callable[[], Result]]:
    """Return the checks that need more than a second device."""
    return {
        "amp fp16 against float32": partial(half_precision, device, "fp16"),
        "amp bf16 against float32": partial(half_precision, device, "bf16"),
        "compile float": partial(compiled, device, quantized=False),
        "compile qat": partial(compiled, device, quantized=True),
        "two processes": partial(two_processes, device.type),
        **{f"engine of {name}": partial(engine, device, name) for name in TENSORRT},
    }


def half_precision(device: torch.device, amp: str) -> Result:
    """Train in 16 bits on the device; compare with float32 on the CPU."""
    if device.type == "cpu":
        raise SkippedError("needs another device than the CPU")
    with TemporaryDirectory() as folder:
        half = fit(trained(device), device, Path(folder), replace(QUICK, amp=amp)).model
        whole = fit(trained(CPU), CPU, Path(folder)).model
        return difference(scores(half, device), scores(whole, CPU)), HALF


def compiled(device: torch.device, *, quantized: bool) -> Result:
    """Train through torch.compile; compare with the same training without it, on the same device."""
    if device.type == mock.NAME:
        raise SkippedError("torch.compile has no code for this device")
    found = []
    for compile in (True, False):
        model, hooks = trained(device), TrainHooks()
        if quantized:
            model, _ = quantize_model(model, QuantConfig(w_bits=4))
            calibrate(model, batches(device))
            hooks = TrainHooks(observing)
        with TemporaryDirectory() as folder:
            found.append(scores(fit(model, device, Path(folder), hooks=hooks, compiled=compile).model, device))
    return difference(*found), LEVEL if quantized else FLOAT


def two_processes(kind: str) -> Result:
    """Train in two processes, one per GPU; compare with one process on the CPU."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        raise SkippedError("needs two GPUs")
    if kind not in ("cuda", "cpu"):
        raise SkippedError("needs CUDA devices or the CPU")
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        (Path(folder) / "ranks").mkdir()
        own = ["-m", "scripts.gpu_check", "--device", kind, "--as-rank", f"{folder}/scores.safetensors"]
        command = [sys.executable, *launcher, f"--master-port={port}", *own]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr[-200:]))
        reference = scores(fit(trained(CPU), CPU, Path(folder)).model, CPU)
        return difference(Outcome(load_file(f"{folder}/scores.safetensors")), reference), FLOAT


def train_as_rank(kind: str, output: Path) -> int:
    """Train as one rank of a process group; rank 0 writes the scores."""
    with distributed.process_group(lambda error: print(error, file=sys.stderr) or 1):
        device = pick_device(distributed.local_device(kind))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model = fit(trained(device), device, output.parent / "ranks").model
        if distributed.rank() == 0:
            save_file({name: value.contiguous() for name, value in scores(model, device).numbers.items()}, output)
    return 0


def engine(device: torch.device, backend: str) -> Result:
    """Build an int8 engine, run it on the GPU, and return the share of images that it classifies unlike torch."""
    if importlib.util.find_spec(TENSORRT[backend]) is None:
        raise SkippedError(f"{TENSORRT[backend]} is not installed")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.engine"
        data = {"data": "digits", "limit": 640}
        net = micronet.train(model="nin", width=0.25, epochs=1, device=str(device), **data)
        int8 = micronet.quantize(net, mode="ptq", a_sign="signed", device=str(device), **data)
        micronet.trt_build(int8, backend=backend, output=path, **data)
        if device.type != "cuda":
            raise SkippedError(f"built {path.stat().st_size:,} bytes; running the engine needs an NVIDIA GPU")
        rows = micronet.compare([int8, path], data="digits")
        return 1 - rows[1].agreement, 0.02


def scores(model: torch.nn.Module, device: torch.device) -> Outcome:
    """Return a network's scores on the training images."""
    with torch.no_grad():
        return Outcome({"scores": torch.cat([model.eval()(batch).cpu() for batch in batches(device)])})


if __name__ == "__main__":
    sys.exit(main())
