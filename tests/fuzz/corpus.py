"""Whole files of every kind that commands read, tiny, with the commands that read them and how to damage them."""

import gc
import io
import json
import os
import shlex
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from micronet.artifact.artifact import load
from micronet.cli.app import run
from micronet.runtimes import openvino
from micronet.runtimes.onnxruntime import metadata
from tests.fuzz import mutate
from tests.fuzz.attempt import Verdict, attempt
from tests.fuzz.mutate_onnx import mutate_onnx
from tests.fuzz.options import option_commands
from tests.fuzz.watch import TRAPS
from tests.tensorrt.fake_gpu import COMPUTE, Gpu, class_scores, write_engine

TINY = "--width 0.1 --limit 60 --batch-size 20 --epochs 1 -q --force"
PTQ = "--mode ptq --calib-batches 1 -q --force"
FEW = "--limit 20 --skip-timing"
IMAGES = ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")
THIN = "images/thin.png images/tall.png images/thin.bmp"  # a million pixels in a row
MAY_HOLD_NAN = ("inspect", "train")  # which reads no tensors; which trains on arrays


@contextmanager
def _fake_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        Gpu().install(patch)
        yield


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        seeds: Whole files to damage.
        commands: Commands that read the damaged file, which is called FILE; WHOLE is the folder of whole files.
        mutate: Damages the content of a file.
        place: Where the commands look for the file, if it is not given to them.
        machine: What the commands need to find on the machine.
    """

    seeds: str
    commands: list[str]
    mutate: Callable[[bytes, Random], bytes]
    place: str | None = None
    machine: Callable[[], AbstractContextManager[None]] = nullcontext


KINDS = {
    "artifact": Kind(
        "float.safetensors pruned.safetensors int8.safetensors binary.safetensors int8-fused.safetensors",
        [
            *["inspect FILE", "inspect FILE --json", "verify FILE", f"evaluate FILE {FEW}"] * 4,
            "predict FILE images/0.png",
            "bn-fuse FILE -o out/x.safetensors -q --force", "pack FILE --skip-timing -o out/x.packed -q --force",
            "sensitivity FILE --limit 20", f"quantize FILE {PTQ} -o out/x.safetensors",
            f"compare FILE float.safetensors {FEW}",
        ],
        mutate.mutate_tensor_file,
    ),
    "checkpoint": Kind(
        "part.checkpoint.safetensors",
        [f"train --data WHOLE/data.npz --model nin {TINY} --epochs 2 --resume -o part.safetensors"],
        mutate.mutate_tensor_file,
        "part.checkpoint.safetensors",
    ),
    "statistics": Kind(
        "statistics.safetensors",
        [f"quantize float.safetensors {PTQ} --calib-cache FILE -o out/x.safetensors"],
        mutate.mutate_tensor_file,
    ),
    "packed": Kind(
        "float.packed int8.packed binary.packed",
        [f"evaluate FILE {FEW}", "predict FILE images/0.png", f"compare FILE float.packed {FEW}", "verify FILE"],
        mutate.mutate_tensor_file,
    ),
    "onnx": Kind(
        "float.onnx int8.onnx external.onnx",
        [
            *["check-onnx FILE", "verify FILE", "predict FILE images/0.png"] * 3,
            "check-onnx FILE", f"evaluate FILE {FEW}", "predict FILE images/0.png", "verify FILE",
            f"quantize FILE {PTQ} --calib-data inputs.npz -o out/x.onnx",
        ],
        mutate_onnx,
    ),
    "ranges": Kind(
        "ranges.cache",
        [f"quantize float.onnx {PTQ} --calib-cache FILE -o out/x.onnx"],
        mutate.mutate_bytes,
    ),
    "engine": Kind(
        "net.engine.json",
        [f"evaluate net.engine {FEW}", "predict net.engine images/0.png", f"compare net.engine float.onnx {FEW}"],
        mutate.mutate_json_file,
        "net.engine.json",
        _fake_gpu,
    ),
    "note": Kind(
        "openvino/micronet.json",
        [f"evaluate openvino {FEW}", "verify openvino", f"compare openvino float.onnx {FEW}",
         "predict openvino images/0.png"],
        mutate.mutate_json_file,
        "openvino/micronet.json",
    ),
    "recipe": Kind("recipe.toml", ["run FILE --data missing.npz -q"], mutate.mutate_toml),
    "journal": Kind(
        "run/recipe.json",
        ["run recipe.toml --data missing.npz -q"],
        mutate.mutate_json_file,
        "run/recipe.json",
    ),
    "npz": Kind(
        "data.npz bomb.npz",
        [f"evaluate float.safetensors --data FILE {FEW}", f"train --data FILE --model nin {TINY} -o out/x.safetensors"],
        mutate.mutate_npz,
    ),
    "inputs": Kind(
        "inputs.npz",
        [
            *["import --model nin --task agreement --data FILE -o out/x.safetensors --force"] * 3,
            f"quantize float.onnx {PTQ} --calib-data FILE -o out/x.onnx",
        ],
        mutate.mutate_npz,
    ),
    "weights": Kind(
        "weights.pth bomb.pth pickle.pth",
        ["""import --model nin --model-args '{"width": 0.1}' --weights FILE -o out/x.safetensors --force"""],
        mutate.mutate_bytes,
    ),
    "image": Kind(
        " ".join(f"images/{index}.{suffix}" for index, suffix in enumerate(IMAGES)) + f" {THIN}",
        ["predict float.packed FILE"],
        mutate.mutate_bytes,
    ),
    "options": Kind("recipe.toml", option_commands(), lambda content, random: content),
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


def fill() -> None:
    """Make the whole files in the working directory; also compiles the packed runtime's kernels."""
    for name in ("images", "out", "run"):
        Path(name).mkdir()
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8), np.arange(80) % 4
    np.savez("data.npz", x_train=pixels[:60], y_train=labels[:60], x_test=pixels[60:], y_test=labels[60:])
    np.savez("inputs.npz", images=random.standard_normal((9, 3, 32, 32), dtype=np.float32))
    for index, suffix in enumerate(IMAGES):
        Image.fromarray(pixels[index]).save(f"images/{index}.{suffix}")
    Path("recipe.toml").write_text(RECIPE)
    Path("run/recipe.json").write_text(json.dumps({"float": {"key": "ab" * 32, "output": "cd" * 32}}))
    for command in (
        f"train --data data.npz --model nin {TINY} -o float.safetensors",
        f"train --data data.npz --model nin {TINY} --epochs 2 --max-time 0.0001 -o part.safetensors",
        "prune float.safetensors --percent 0.3 --skip-timing -q -o pruned.safetensors",
        f"quantize float.safetensors {PTQ} --calib-cache statistics.safetensors -o int8.safetensors",
        "quantize float.safetensors --limit 60 --batch-size 20 --epochs 1 --w-bits binary --a-bits binary -q "
        "-o binary.safetensors",
        "bn-fuse int8.safetensors -q -o int8-fused.safetensors",
        "export-onnx float.safetensors -q --skip-timing -o float.onnx",
        "export-onnx int8-fused.safetensors -q --skip-timing -o int8.onnx",
        "export int8-fused.safetensors --target openvino -q --skip-timing -o openvino",
        *(f"pack {name}.safetensors -q --skip-timing -o {name}.packed" for name in ("float", "int8", "binary")),
        *(f"evaluate {name}.packed {FEW} -q" for name in ("float", "int8", "binary")),
    ):
        code = run(shlex.split(command))
        assert code in (0, 3), command
    torch.save(load(Path("float.safetensors")).model.state_dict(), "weights.pth")
    _fill_hostile()


def _fill_hostile() -> None:
    """Make files that are hostile before they are damaged, and others that damaged ones can point to."""
    Image.new("L", (1_000_000, 1)).save("images/thin.png")
    Image.new("L", (1, 1_000_000)).save("images/tall.png")
    Image.new("1", (1_000_000, 1)).save("images/thin.bmp")
    model = onnx.load("float.onnx")
    names = [model.graph.input[0].name, *(node.output[0] for node in model.graph.node)]
    Path("ranges.cache").write_text("TRT-8601-EntropyCalibration2\n" + "".join(f"{name}: 3c010a14\n" for name in names))
    onnx.save(model, "external.onnx", save_as_external_data=True, location="external.bin", size_threshold=64)
    COMPUTE["four"] = lambda images: class_scores(images)[:, [0, 1, 2, 0]]
    write_engine(Path("net.engine"), (1, 3, 32, 32), (64, 3, 32, 32), compute="four", metadata=metadata(model))
    for name in ("bomb.npz", "bomb.pth"):  # their directories promise 64 GiB
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 36,)})
            archive.writestr("x_train.npy" if name.endswith("npz") else "w/data.pkl", header.getvalue() + bytes(9000))
        content = file.getvalue()
        size = struct.pack("<I", len(header.getvalue()) + 9000)
        Path(name).write_bytes(content.replace(size, b"\xff\xff\xff\x7f"))
    Path("pickle.pth").write_bytes(b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch evil!\x85R.")


def set_traps() -> None:
    """Put into the working directory what nothing may run or read, and what ONNX files may point to in vain."""
    for name, content in TRAPS.items():
        Path(name).write_text(content)
    os.mkfifo("pipe.bin")
    Path("link.bin").symlink_to("/etc/passwd")
    with Path("huge.bin").open("wb") as file:
        file.truncate(1 << 40)


def damage(kind: Kind, folder: Path, random: Random) -> tuple[list[str], bytes]:
    """Write a damaged file into the working directory, a copy of a filled folder.

    Returns:
        A command that reads it, and its content; none if something else than a file is in its place.
    """
    seed = random.choice(kind.seeds.split())
    place = Path(kind.place or f"damaged{Path(seed).suffix}")
    content = kind.mutate((folder / seed).read_bytes(), random)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    if random.random() < 0.02:
        content = b""
        random.choice(
            [
                lambda: os.mkfifo(place),
                place.mkdir,
                lambda: place.symlink_to("/dev/zero"),
                lambda: place.symlink_to(place.name),
                lambda: place.symlink_to("huge.bin"),
                lambda: place.symlink_to("/proc/self/mem"),
                lambda: None,
            ]
        )()
    else:
        place.write_bytes(content)
    return _words(random.choice(kind.commands), place, folder), content


def _words(command: str, place: Path, folder: Path) -> list[str]:
    words = shlex.split(command)
    return [str(place) if word == "FILE" else word.replace("WHOLE", str(folder)) for word in words]


def warm_up(folder: Path) -> None:
    """Run every command on a whole file, so that processes forked from this one have imported what it needs."""
    for kind in (each for name, each in KINDS.items() if name != "options"):
        seed = kind.seeds.split()[0]
        place = Path(kind.place or f"damaged{Path(seed).suffix}")
        for command in dict.fromkeys(kind.commands):
            place.write_bytes((folder / seed).read_bytes())
            words = _words(command, place, folder)
            with kind.machine():
                verdict = attempt(words)
            assert verdict.code == (2 if command.startswith("run ") else 0) and not verdict.faults, (words, verdict)
    openvino._core.cache_clear()  # its threads are not in forked processes, which would wait for them
    gc.collect()


def try_one(kind: Kind, folder: Path, random: Random) -> tuple[list[str], bytes, Verdict]:
    """Damage a file and run a command that reads it; return the command, the file's content and how it ended."""
    words, content = damage(kind, folder, random)
    with kind.machine():
        verdict = attempt(words)
    if verdict.code == 0 and words[0] not in MAY_HOLD_NAN and mutate.holds_nan(content):
        verdict.faults.append("exit code 0 with NaN")
    return words, content, verdict
