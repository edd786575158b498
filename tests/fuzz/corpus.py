"""Whole files of every kind that commands read, tiny, with the commands that read them and how to damage them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from micronet.cli.app import run
from tests.fuzz import mutate

FILE = "FILE"  # stands for the damaged file in a command
TINY = ["--width", "0.1", "--limit", "60", "--batch-size", "20", "--epochs", "1", "-q", "--force"]
FAST = ["--limit", "20", "--batch-size", "20"]


@dataclass(frozen=True)
class Kind:
    """A kind of file: whole ones to begin with, commands that read it (with FILE), and its mutation."""

    seeds: list[Path]
    commands: list[list[str]]
    mutate: Callable[[bytes, Random], bytes]


def make(folder: Path) -> dict[str, Kind]:
    """Make the whole files in a folder, with which commands are then run as the working directory."""
    _data(folder)
    net = folder / "float.safetensors"
    _run("train", "--data", "data.npz", "--model", "nin", *TINY, "-o", net)
    _run(
        "train",
        "--data",
        "data.npz",
        "--model",
        "nin",
        *TINY,
        "--epochs",
        "2",
        "--max-time",
        "0.0001",
        "-o",
        "part.safetensors",
    )
    _run("prune", net, "--percent", "0.3", "-q", "--force", "-o", "pruned.safetensors", "--skip-timing")
    _run(
        "quantize",
        net,
        "--mode",
        "ptq",
        "--calib-batches",
        "20",
        "-q",
        "--force",
        "-o",
        "int8.safetensors",
        "--calib-cache",
        "statistics.safetensors",
    )  # noqa: E501
    _run("quantize", net, *TINY[2:], "--w-bits", "binary", "--a-bits", "binary", "-o", "binary.safetensors")
    for name in ("float", "int8"):
        _run("bn-fuse", f"{name}.safetensors", "-q", "--force", "-o", f"{name}-fused.safetensors")
        _run("export-onnx", f"{name}-fused.safetensors", "-q", "--force", "-o", f"{name}.onnx")
    for name in ("float", "int8", "binary"):
        _run("pack", f"{name}.safetensors", "-q", "--force", "-o", f"{name}.packed")
        _run("predict", f"{name}.packed", "images/0.png", "--json")  # compiles the kernels
    from micronet.artifact.artifact import load

    torch.save(load(net).model.state_dict(), folder / "weights.pth")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "recipe.json").write_text(json.dumps({"float": {"key": "ab" * 32, "output": "cd" * 32}}))
    artifacts = [
        folder / f"{name}.safetensors" for name in ("float", "pruned", "int8", "binary", "float-fused", "int8-fused")
    ]
    packed = [folder / f"{name}.packed" for name in ("float", "int8", "binary")]
    graphs = [folder / "float.onnx", folder / "int8.onnx"]
    out = ["-o", "out/result", "--force", "-q"]
    return {
        "artifact": Kind(artifacts, [["inspect", FILE], ["inspect", FILE, "--json"], ["evaluate", FILE, *FAST],
            ["predict", FILE, "images/0.png"], ["bn-fuse", FILE, "-o", "out/x.safetensors", "--force", "-q"],
            ["pack", FILE, "-o", "out/x.packed", "--force", "-q"], ["sensitivity", FILE, *FAST[:2]],
            ["quantize", FILE, "--mode", "ptq", "--calib-batches", "1", "-o", "out/x.safetensors", "--force", "-q"],
            ["compare", FILE, "float.safetensors", *FAST]], mutate.mutate_tensor_file),
        "checkpoint": Kind([folder / "part.checkpoint.safetensors"], [["train", "--data", "data.npz", "--model", "nin", *TINY,
            "--epochs", "2", "--resume", "-o", "part.safetensors"]], mutate.mutate_tensor_file),
        "statistics": Kind([folder / "statistics.safetensors"], [["quantize", "float.safetensors", "--mode", "ptq",
            "--calib-batches", "1", "--calib-cache", FILE, "-o", "out/x.safetensors", "--force", "-q"]], mutate.mutate_tensor_file),
        "packed": Kind(packed, [["evaluate", FILE, *FAST], ["predict", FILE, "images/0.png"], ["compare", FILE, "float.packed", *FAST]],
            mutate.mutate_tensor_file),
        "onnx": Kind(graphs, [["check-onnx", FILE], ["evaluate", FILE, *FAST], ["predict", FILE, "images/0.png"],
            ["quantize", FILE, "--mode", "ptq", "--calib-batches", "1", "-o", "out/x.onnx", "--force", "-q", "--calib-data", "data.npz"]],
            mutate.mutate_onnx),
        "recipe": Kind([folder / "recipe.toml"], [["run", FILE, "--dry-run"]], mutate.mutate_toml),
        "journal": Kind([folder / "run" / "recipe.json"], [["run", "recipe.toml", "--dry-run"]], mutate.mutate_json_file),
        "npz": Kind([folder / "data.npz"], [["evaluate", "float.safetensors", "--data", FILE, *FAST],
            ["train", "--data", FILE, "--model", "nin", *TINY, "-o", "out/x.safetensors"]], mutate.mutate_npz),
        "inputs": Kind([folder / "inputs.npz"], [["import", "--model", "nin", "--task", "agreement", "--data", FILE, "-o",
            "out/x.safetensors", "--force"], ["quantize", "float.onnx", "--mode", "ptq", "--calib-data", FILE, "-o", "out/x.onnx",
            "--force", "-q"]], mutate.mutate_npz),
        "weights": Kind([folder / "weights.pth"], [["import", "--model", "nin", "--model-args", '{"width": 0.1}', "--weights", FILE,
            "-o", "out/x.safetensors", "--force"]], mutate.mutate_bytes),
        "image": Kind(sorted((folder / "images").iterdir()), [["predict", "float.safetensors", FILE]], mutate.mutate_bytes),
    }  # fmt: skip


RECIPE = """folder = "run"

[[stage]]
command = "train"
name = "float"
model = "nin"
data = "data.npz"
width = 0.1
epochs = 1
limit = 60

[[stage]]
command = "quantize"
mode = "ptq"
w_bits = 8
a-bits = 8
calib_batches = 1

[[stage]]
command = "export-onnx"
name = "deployed"
"""


def attempt_paths(kind: str, file: Path) -> Path:
    """Return where a damaged file of a kind must be for its commands to find it."""
    fixed = {"checkpoint": "part.checkpoint.safetensors", "journal": "run/recipe.json"}
    return Path(fixed.get(kind, f"damaged{file.suffix}"))


def _data(folder: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(80) % 4
    np.savez(folder / "data.npz", x_train=pixels[:60], y_train=labels[:60], x_test=pixels[60:], y_test=labels[60:])
    np.savez(folder / "inputs.npz", images=random.standard_normal((9, 3, 32, 32), dtype=np.float32))
    for name in ("images", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    for index, suffix in enumerate(("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")):
        Image.fromarray(pixels[index]).save(folder / "images" / f"{index}.{suffix}")


def _run(*arguments: str | Path) -> None:
    code = run([str(word) for word in arguments])
    assert code in (0, 3), arguments
