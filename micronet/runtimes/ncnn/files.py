"""The files of an ncnn network: NAME.param (its layers), NAME.bin (its numbers) and NAME.json (what is known of it).

ncnn reads the first two. It checks nothing, and a damaged file can crash the process, so ``read`` checks every line and
the length of every tensor first. The third has the hashes of the others, and what evaluate and compare need.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micronet.core.files import write_bytes
from micronet.core.parse import parse_json, read_text
from micronet.errors import FailedError, MicronetError
from micronet.packed.checks import check_about
from micronet.packed.program import Program
from micronet.runtimes.ncnn.kinds import KINDS, infer, macs, tensor_sizes
from micronet.runtimes.ncnn.layer import ARRAY, LONGEST_NAME, MAGIC, TAGS, WITH_TAG, Layer, Parameter, clean
from micronet.runtimes.ncnn.lowering import INPUT, Lowered, lower
from micronet.runtimes.ncnn.shapes import Blob

FORMAT = 1
AGAIN = "export the network again with micronet export --target ncnn"
PIXEL = 255  # the largest value of a pixel
_NAME = re.compile(r"[^\x00-\x20\x7f]+")
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_FLOAT = re.compile(r"-?[0-9]\.[0-9]{8}e[-+][0-9]{2}")


class NcnnFile(NamedTuple):
    """An ncnn network that was read and checked; ``param`` and ``bin``: what its files hold."""

    layers: list[Layer]
    blobs: dict[str, Blob]
    note: dict[str, Any]
    param: bytes
    bin: bytes

    @property
    def weights(self) -> int:
        """The number of weights and biases."""
        found = 0
        for layer in self.layers:
            if layer.kind in WITH_TAG or layer.kind == "Scale":
                has_bias = layer.number(1 if layer.kind in ("InnerProduct", "Scale") else 5)
                found += sum(tensor_sizes(layer)[: 1 + has_bias])
        return found

    @property
    def macs(self) -> int:
        """The multiply-accumulates per image."""
        return sum(macs(layer, self.blobs[layer.outputs[0]]) for layer in self.layers)


def to_files(program: Program, name: str, *, fp16_storage: bool = False) -> dict[str, bytes]:
    """Return a network's files by their names.

    Args:
        program: What ``pack`` makes of a network.
        name: Of the files, without a suffix.
        fp16_storage: Store float weights as float16: half as large, and rounded to 11 bits.

    Raises:
        MicronetError: ncnn cannot run the network; names every operation that it cannot run and what to do.
    """
    found = lower(program, fp16_storage)
    blobs = {blob for layer in found.layers for blob in layer.outputs}
    lines = [MAGIC, f"{len(found.layers)} {len(blobs)}", *(layer.line for layer in found.layers)]
    parts = {".param": ("\n".join(lines) + "\n").encode(), ".bin": b"".join(layer.data for layer in found.layers)}
    hashes = {suffix[1:]: hashlib.sha256(data).hexdigest() for suffix, data in parts.items()}
    note = {"format": FORMAT, **hashes, "fp16_storage": fp16_storage, **_described(program, found)}
    parts[".json"] = json.dumps(note, indent=1, sort_keys=True).encode()
    return {f"{name}{suffix}": data for suffix, data in parts.items()}


def _described(program: Program, found: Lowered) -> dict[str, Any]:
    """Return what a user of the files needs to know: names of blobs, how to normalize pixels, what is int8."""
    data: dict[str, Any] = program.about.get("data") or {}
    normalized = {}
    if data.get("mean") and data.get("std"):  # for substract_mean_normalize
        normalized["mean"] = [PIXEL * value for value in data["mean"]]
        normalized["norm"] = [1 / (PIXEL * value) for value in data["std"]]
    precisions = {
        clean(step.operations[0].name): f"float: {step.why_float}" if step.why_float else "int8" for step in found.steps
    }
    return {
        "input": {"blob": INPUT, "shape": program.shape, **normalized}, "outputs": found.outputs,
        "layers": precisions, "about": program.about,
    }  # fmt: skip


def write_ncnn(program: Program, folder: Path, name: str = "network", *, fp16_storage: bool = False) -> list[Path]:
    """Write a network's files into a folder, which is created; return their paths, that of the .param file first.

    See ``to_files`` for the arguments and errors; if ncnn cannot run the network, nothing is written.
    """
    files = to_files(program, name, fp16_storage=fp16_storage)
    folder.mkdir(parents=True, exist_ok=True)
    for file in reversed(files):  # the .param file last: before, nothing can be opened
        write_bytes(folder / file, files[file])
    return [folder / file for file in files]


def read(path: Path) -> NcnnFile:
    """Read and check the files of a network that ``to_files`` made.

    Args:
        path: Its .param file; the others are beside it.

    Raises:
        MicronetError: One is missing, was not written by micronet, or is damaged.
        FailedError: A weight is NaN or infinite.
    """
    weights, about = path.with_suffix(".bin"), path.with_suffix(".json")
    for each in (path, weights, about):
        if not each.is_file():
            raise MicronetError(
                f"{each} does not exist; an ncnn network has a .param, a .bin and a .json file; {AGAIN}"
            )
    try:
        note = parse_json(read_text(about))
        param, data = read_text(path).encode(), weights.read_bytes()
        if note["format"] != FORMAT:
            raise MicronetError(f"{about} has a format that this version of micronet does not know; {AGAIN}")
        for content, key in ((param, "param"), (data, "bin")):
            if hashlib.sha256(content).hexdigest() != note[key]:
                raise ValueError(f"the .{key} file is not the one that was written with the .json file")
        layers, blobs = _parse(param.decode())
        _take_tensors(layers, data)
        if [note["input"]["blob"], *note["outputs"]] != [INPUT, *(f"out{n}" for n in range(len(note["outputs"])))]:
            raise ValueError("its inputs or outputs are not the ones that micronet names")
        if not note["outputs"] or any(blob not in blobs for blob in note["outputs"]):
            raise ValueError("it computes no output")
        check_about(note["about"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise MicronetError(
            f"{path} is not an ncnn network that micronet wrote, or is damaged ({error}); {AGAIN}"
        ) from error
    return NcnnFile(layers, blobs, note, param, data)


def _parse(text: str) -> tuple[list[Layer], dict[str, Blob]]:
    """Return the layers of a .param file and the blobs that they compute. Raises ValueError if one is invalid."""
    magic, counts, *lines = text.removesuffix("\n").split("\n")
    if magic != MAGIC or not re.fullmatch(r"[0-9]{1,6} [0-9]{1,6}", counts) or not lines:
        raise ValueError("its first lines are invalid")
    layers, blobs, unread = list[Layer](), dict[str, Blob](), set[str]()
    for line in lines:
        layer = _parse_layer(line)
        if (layer.kind == "Input") != (not layers) or (not layers and layer.outputs != [INPUT]):
            raise ValueError("its input is not its first layer")
        if len(set(layer.inputs)) < len(layer.inputs) or not set(layer.inputs) <= unread:
            raise ValueError(f"{layer.name} reads what is not computed, or is read elsewhere")
        found = infer(layer, [blobs[blob] for blob in layer.inputs])
        if len(set(layer.outputs)) < len(layer.outputs) or set(layer.outputs) & set(blobs):
            raise ValueError(f"{layer.name} computes what another layer computes")
        blobs.update(zip(layer.outputs, found, strict=True))
        unread = unread - set(layer.inputs) | set(layer.outputs)
        layers.append(layer)
    if counts != f"{len(layers)} {len(blobs)}":
        raise ValueError("it does not have as many layers and blobs as its second line says")
    return layers, blobs


def _parse_layer(line: str) -> Layer:
    kind, name, inputs, outputs, *rest = line.split()
    if kind not in KINDS or not _INTEGER.fullmatch(inputs) or not _INTEGER.fullmatch(outputs):
        raise ValueError(f"{line!r:.60} is not a layer that micronet writes")
    reads, writes = int(inputs), int(outputs)
    blobs = rest[: reads + writes]
    if min(reads, writes) < 0 or len(blobs) < reads + writes:
        raise ValueError(f"{name} has too few blobs")
    if not all(_NAME.fullmatch(each) and len(each.encode()) <= LONGEST_NAME for each in (name, *blobs)):
        raise ValueError(f"a name of {line!r:.60} is longer than {LONGEST_NAME} bytes or has control characters")
    parameters: dict[int, Parameter] = {}
    for item in rest[reads + writes :]:
        key, value = _parse_parameter(item)
        if key in parameters:
            raise ValueError(f"{name} has a parameter twice")
        parameters[key] = value
    layer = Layer(kind, name, blobs[:reads], blobs[reads:], parameters)
    if layer.line != line:  # ncnn could read other numbers or names in it
        raise ValueError(f"{name} is not written as micronet writes layers")
    return layer


def _parse_parameter(item: str) -> tuple[int, Parameter]:
    key, _, text = item.partition("=")
    if not _INTEGER.fullmatch(key):
        raise ValueError(f"the parameter {item!r:.40} is invalid")
    if int(key) >= 0:
        return int(key), _parse_number(text)
    count, *values = text.split(",")
    numbers = [_parse_number(value) for value in values]
    if count != str(len(values)) or len(set(map(type, numbers))) > 1:
        raise ValueError(f"the parameter {item!r:.40} is invalid")
    return ARRAY - int(key), numbers


def _parse_number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    raise ValueError(f"{text!r:.40} is not a number that micronet writes")


def _take_tensors(layers: list[Layer], data: bytes) -> None:
    """Give the layers their tensors. Raises ValueError if the .bin file does not have them exactly."""
    place = 0
    for layer in layers:
        for index, size in enumerate(tensor_sizes(layer)):
            kind = np.dtype(np.float32)
            if layer.kind in WITH_TAG and not index:
                tags = {tag.to_bytes(4, "little"): name for name, tag in TAGS.items()}
                kind = np.dtype(tags.get(data[place : place + 4], "V1"))
                if kind.kind == "V" or (kind == np.int8) != bool(layer.number(8)):
                    raise ValueError(f"the weights of {layer.name} have the wrong type")
                place += 4
            if place + size * kind.itemsize > len(data):
                raise ValueError("the .bin file is too short")
            tensor = np.frombuffer(data, kind.newbyteorder("<"), size, place)
            if not np.isfinite(tensor).all():
                raise FailedError(f"the weights of {layer.name} have NaN or infinity; {AGAIN}")
            layer.tensors.append(tensor)
            place += -(-size * kind.itemsize // 4) * 4
    if place != len(data):
        raise ValueError("the .bin file is too long")
