"""Measure the speed and accuracy of int8 in ONNX Runtime against float.

    python scripts/bench_onnx.py [--networks nin resnet18] [--batch 1 64] [--threads 1] [--rounds 15]

For each network (initial weights, calibrated on noise, since speed does not depend on what is learned) the float,
W8A8 and W7A8 files run in turns in one process, with micronet's exact and fast arithmetic, which are the same on
processors with VNNI, and W8A8 also with the exact kernels that ONNX Runtime has for processors without VNNI. "over
float": the median over rounds of float time / own time in the same round. "error": the distance of the scores from
the same file run without optimization, which simulates the integers in float, divided by the spread of the scores.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.onnx.export import to_onnx
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import EXACT_INT8, session_predictor

NETWORKS = {"nin": ("nin", {}, 32), "nin_gc": ("nin_gc", {}, 32), "resnet18": ("torchvision:resnet18", {}, 224)}
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def simulated(model: bytes) -> Run:
    """Return a function that runs a file without optimization."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def without_vnni(model: bytes, threads: int) -> Run:
    """Return a function that runs a file with the exact kernels for processors without VNNI."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry(EXACT_INT8, "1")
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def files(name: str) -> dict[str, bytes]:
    """Return a network's float, W8A8 and W7A8 files."""
    kind, args, side = NETWORKS[name]
    spec = ModelSpec(kind, args)
    torch.manual_seed(1)
    model, images = build_model(spec), torch.randn(8, 3, side, side)
    with torch.no_grad():
        for _ in range(3):
            model(images)  # gives the batch norms statistics
    found = {"float": to_onnx(Artifact(model.eval(), spec), images).SerializeToString()}
    for label, bits in (("W8A8", 8), ("W7A8", 7)):
        quantized, record = quantize_model(model, QuantConfig(w_bits=bits, first_last="same"))
        calibrate(quantized, [images])
        found[label] = to_onnx(Artifact(quantized.eval(), spec, [record]), images).SerializeToString()
    return found


def error(run: Run, reference: Run, images: NDArray[np.float32]) -> float:
    """Return ||scores - expected|| / ||expected - their mean per image||."""
    expected, scores = reference(images), run(images)
    return float(np.linalg.norm(scores - expected) / np.linalg.norm(expected - expected.mean(1, keepdims=True)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["nin", "resnet18"], choices=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.threads]))
    print(f"{describe_machine()}; {args.threads} threads\n")
    print("| network | batch | file | ms (median) | over float | error | bytes |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name in args.networks:
        serialized = files(name)
        runs: dict[str, tuple[Run, str]] = {}
        for label, file, arithmetic in (
            ("float", "float", "exact"), ("W8A8, exact", "W8A8", "exact"), ("W8A8, fast", "W8A8", "fast"),
            ("W7A8, exact", "W7A8", "exact"), ("W7A8, fast", "W7A8", "fast"),
        ):  # fmt: skip
            options = RuntimeOptions(threads=args.threads, arithmetic=arithmetic)
            runs[label] = session_predictor(serialized[file], options), file
        runs["W8A8, x64quantprecision"] = without_vnni(serialized["W8A8"], args.threads), "W8A8"
        for batch in args.batch:
            images = np.random.default_rng(0).standard_normal((batch, 3, *[NETWORKS[name][2]] * 2), dtype=np.float32)
            few = np.resize(images, (8, *images.shape[1:]))
            times: dict[str, list[float]] = {label: [] for label in runs}
            for round_ in range(args.rounds + 1):
                order = list(runs) if round_ % 2 else list(runs)[::-1]
                for label in order:
                    start = time.perf_counter()
                    runs[label][0](images)
                    times[label].append(time.perf_counter() - start)
            for label, (run, file) in runs.items():
                own = times[label][1:]  # the first round warms up
                ratio = statistics.median(a / b for a, b in zip(times["float"][1:], own, strict=True))
                off = error(run, simulated(serialized[file]), few)
                print(
                    f"| {name} | {batch} | {label} | {1000 * statistics.median(own):.2f} | {ratio:.2f} | {off:.3%} | "
                    f"{len(serialized[file]):,} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
