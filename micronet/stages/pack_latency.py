"""How fast a packed network is, beside the same network in ONNX Runtime: as exported, and in float."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from micronet.core.timing import is_slower
from micronet.errors import first_line
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Predictor
from micronet.onnx.speed import without_quantizers
from micronet.packed.program import Program
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.runtimes.packed.predictor import choose_backend


def measure_packed(program: Program, proto: onnx.ModelProto, image: NDArray[np.float32]) -> dict[str, Any]:
    """Time a packed network and ONNX Runtime with one thread and one image, in turns.

    Args:
        program: The packed network.
        proto: What it was made of.
        image: A batch (1, C, H, W).

    Returns:
        ``packed_ms``, ``onnx_float_ms``, and if the network is quantized ``onnx_ms``, medians; ``kernel``: what runs
        the packed network; ``float_layers`` and ``layers``: its layers with float weights, and all; or ``skipped``:
        why nothing was measured. ``words``: the same in a line, and ``slower``: if it says so. Never raises an
        exception of its own.
    """
    options, plain = RuntimeOptions(threads=1), without_quantizers(proto)
    try:
        packed, kernel = choose_backend(program, 1)
        networks: dict[str, Predictor] = {
            "packed_ms": packed, "onnx_float_ms": session_predictor(plain.SerializeToString(), options),
        }  # fmt: skip
        if len(plain.graph.node) < len(proto.graph.node):
            networks["onnx_ms"] = session_predictor(proto.SerializeToString(), options)
        timed = latencies(list(networks.values()), [image] * len(networks), one_thread=True)
    except Exception as error:  # a courtesy: whatever a runtime raises must not spoil the packing
        return {"skipped": first_line(error), "slower": False, "words": f"speed not measured: {first_line(error)}"}
    float_layers, layers = _count_layers(program)
    found = {
        **{name: round(latency.p50_ms, 4) for name, latency in zip(networks, timed, strict=True)},
        "kernel": kernel, "layers": layers, "float_layers": float_layers,
    }  # fmt: skip
    slower, words = describe(found)
    return {**found, "slower": slower, "words": words}


def describe(found: dict[str, Any]) -> tuple[bool, str]:
    """Return if a packed network is slower than in ONNX Runtime, and a line with the times, the cause and a way out."""
    ours, floats, theirs = found["packed_ms"], found["onnx_float_ms"], found.get("onnx_ms")
    times = f"{ours:.2f} ms vs. {floats:.2f} ms in float"
    times += f" and {theirs:.2f} ms quantized" if theirs is not None else ""
    times += " in ONNX Runtime (1 thread, batch 1)"
    rivals = {"float": floats} | ({} if theirs is None else {"quantized": theirs})
    name = min(rivals, key=lambda each: rivals[each])
    if not is_slower(ours, rivals[name]):
        return False, f"speed     {times}"
    cause = _cause(found["float_layers"], found["layers"], found["kernel"])
    return True, f"slower than the {name} network: {times}; {cause}"


def packed_cause(program: Program) -> str:
    """Return why a packed network is slow, and what helps."""
    return _cause(*_count_layers(program))


def _count_layers(program: Program) -> tuple[int, int]:
    """Return how many layers have float weights, and how many have weights."""
    weights = [operation.weight for operation in program.operations if operation.weight is not None]
    return sum(weight.dtype.kind == "f" for weight in weights), len(weights)


def _cause(float_layers: int, layers: int, kernel: str = "") -> str:
    if kernel.startswith("numpy"):
        return f"it ran in {kernel}"
    if not float_layers:
        return "use micronet export-onnx for a faster file"
    return (
        f"{float_layers} of its {layers} layers have float weights, but the packed runtime is designed for few bits; "
        "quantize them, or use micronet export-onnx"
    )
