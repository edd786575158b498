"""The text of a recipe for what is wanted of a network: commented TOML, stage by stage."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from micronet import registry
from micronet.core.parse import spell_toml
from micronet.errors import visible

Goal = Literal["small", "fast", "low-bit"]
CAREFUL_DROP = 1.0  # points; below, less is pruned
BINARY_DROP = 3.0  # points; from here on, weights and activations are binary
KEPT, KEPT_CAREFULLY = 0.5, 0.75  # shares of what is pruned
BYTES_IN_BITS = ("packed", "c")  # targets whose files and kernels gain from fewer than 8 bits
SIGNED = ("ncnn", "tensorrt")  # targets whose integers have no zero point
FLOATS = ("onnxruntime", "openvino", "ncnn")  # targets whose float network is exported too, to compare speeds with


@dataclass(frozen=True)
class Answers:
    """What is wanted of a network, as answered to ``init``.

    Attributes:
        model: A network's name or code, or the path of an artifact or an ONNX file.
        data: The data set, or None for that which the file records.
        goal: What to gain.
        runtime: One of ``registry.TARGETS``, or for an ONNX file of ``registry.ONNX_RUNTIMES``.
        max_drop: The accuracy that may be lost, in percentage points.
        code: The network's code that must be named again to read the file, if any.
    """

    model: str
    data: str | None
    goal: Goal
    runtime: str
    max_drop: float
    code: str | None = None

    @property
    def suffix(self) -> str:
        """The suffix of the file that the recipe begins with, or nothing if it trains a new network."""
        suffix = Path(self.model).suffix
        return suffix if suffix in (".safetensors", ".onnx") else ""


def compose(answers: Answers, path: Path) -> str:
    """Return the text of a recipe that is to be written to a path."""
    gain = {"small": "as small as possible", "fast": "as fast as possible", "low-bit": "with as few bits as possible"}
    head = [
        f"# Written by micronet init: {visible(answers.model)}, {gain[answers.goal]}, for {answers.runtime},",
        f"# not {_points(answers)} less accurate. Change what you like, then run it:",
        f"#   {visible(shlex.join(['micronet', 'run', str(path)]))}",
        "# Every key is an option of its command; micronet COMMAND --help explains them.",
        f"folder = {spell_toml(f'runs/{path.stem}')}",
    ]
    stages = _of_onnx(answers) if answers.suffix == ".onnx" else _of_network(answers)
    parts = [
        [*(f"# {line}" for line in comment.splitlines()), "[[stage]]",
         *(f"{key} = {spell_toml(value)}" for key, value in keys.items() if value is not None)]
        for comment, keys in stages
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in [head, *parts]) + "\n"


Stages = Iterator[tuple[str, dict[str, Any]]]


def _of_onnx(answers: Answers) -> Stages:
    yield "8-bit integers, from the ranges that the layers have on some of the data.", {
        "command": "quantize", "name": "int8", "artifact": answers.model, "mode": "ptq", "data": answers.data,
    }  # fmt: skip
    yield _gate(answers), {
        "command": "compare", "files": [answers.model, "int8"], "runtime": answers.runtime,
        "max_drop": answers.max_drop,
    }  # fmt: skip


def _of_network(answers: Answers) -> Stages:
    first: dict[str, Any] = {}
    if answers.suffix:  # the first stage names the file, and the data if they are not the file's
        first, base = {"artifact": answers.model, "model": answers.code, "data": answers.data}, answers.model
    else:
        base = "float"
        yield "The float network. More epochs take longer, and gain accuracy." + _on_folder(answers), {
            "command": "train", "name": base, "model": answers.model, "data": answers.data,
            "task": _task(answers.data), "epochs": 15,
        }  # fmt: skip
    if answers.goal != "low-bit":
        what = "target_macs" if answers.goal == "fast" else "target_params"
        noun = "multiply-accumulates" if answers.goal == "fast" else "parameters"
        kept = KEPT if answers.max_drop >= CAREFUL_DROP else KEPT_CAREFULLY
        yield f"Channels are removed until {kept:.0%} of the {noun} are left, in widths that kernels are fast at.", {
            "command": "prune", "name": "pruned", **first, what: kept, "regular": 8, "criterion": "l2",
        }  # fmt: skip
        first = {}
        yield "Training wins back accuracy; the whole network teaches the pruned one.", {
            "command": "finetune", "name": "finetuned", "epochs": 8, "distill": base, "model": answers.code,
        }  # fmt: skip
    comment, bits = _bits(answers)
    yield comment, {"command": "quantize", "name": "quantized", **first, "model": answers.code, **bits}
    if bits["w_bits"] != "binary":
        yield "Batch norms become part of the layers before them.", {
            "command": "bn-fuse", "name": "fused", "model": answers.code,
        }  # fmt: skip
    files = [base]
    if answers.runtime in FLOATS:
        files = ["float_exported"]
        yield "The float network in the same runtime, to compare speeds with.", {
            **_export(answers, "float_exported"), "artifact": base, "model": answers.code,
        }  # fmt: skip
    yield "The network to ship.", {
        **_export(answers, "exported"), "artifact": "quantized" if bits["w_bits"] == "binary" else "fused",
        "low_bit_storage": True if answers.goal == "low-bit" and answers.runtime == "onnxruntime" else None,
        "model": answers.code,
    }  # fmt: skip
    if answers.runtime == "tensorrt":
        yield "The engine. TensorRT-RTX builds it without a GPU, TensorRT on the GPU that will run it.", {
            "command": "trt-build", "name": "engine", "artifact": "exported",
        }  # fmt: skip
    yield _gate(answers), {
        "command": "compare", "files": [*files, "exported"], "model": answers.code,
        "data": answers.data if answers.suffix else None, "max_drop": answers.max_drop,
    }  # fmt: skip


def _export(answers: Answers, name: str) -> dict[str, Any]:
    target = registry.TARGETS[answers.runtime]
    if target == "pack":
        return {"command": "pack", "name": name}
    if target in registry.STAGES:  # an ONNX file; TensorRT's engine is built from it
        tensorrt = "tensorrt" if answers.runtime == "tensorrt" else None
        return {"command": "export-onnx", "name": name, "target": tensorrt}
    return {"command": "export", "name": name, "target": answers.runtime}


def _bits(answers: Answers) -> tuple[str, dict[str, Any]]:
    """Return how to quantize, and a comment that says why."""
    signed = {"q_type": "sym", "a_sign": "signed"} if answers.runtime in SIGNED else {}
    if answers.goal != "low-bit":
        return "8-bit integers, with a short training.", {"w_bits": 8, "a_bits": 8, "epochs": 2, **signed}
    if answers.runtime not in BYTES_IN_BITS:
        why = f"4-bit weights. {answers.runtime} computes them in 8 bits; packed and c gain speed from fewer, too."
        return why, {"w_bits": 4, "a_bits": 8, "epochs": 4, **signed}
    if answers.max_drop < BINARY_DROP:
        return "4-bit weights and activations, with learned steps.", {
            "method": "lsq", "w_bits": 4, "a_bits": 4, "epochs": 8,
        }  # fmt: skip
    return "Binary weights and activations: the smallest network, at a cost in accuracy.", {
        "w_bits": "binary", "a_bits": "binary", "epochs": 15,
    }  # fmt: skip


def _gate(answers: Answers) -> str:
    return f"The run fails if the accuracy falls by {_points(answers)}; max_size and max_latency are gates, too."


def _points(answers: Answers) -> str:
    return f"more than {answers.max_drop:g} percentage point{'s' * (answers.max_drop != 1)}"


def _task(data: str | None) -> str | None:
    """Return the task of a folder of images with masks, which is not the default one."""
    return "segmentation" if data is not None and (Path(data) / "train" / "masks").is_dir() else None


def _on_folder(answers: Answers) -> str:
    if answers.data is None or not Path(answers.data).is_dir():
        return ""
    return '\nAdd image_size = 64, or "240x320", for example, unless all images are squares of one size.'
