"""The files of an ncnn network: its layers (.param) and its numbers (.bin); and what its folder's note says of it.

ncnn checks nothing, and a damaged file can crash the process, so ``read`` checks every line and the length of every
tensor first.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micronet.core.files import write_bytes
from micronet.core.parse import read_text
from micronet.errors import FailedError, MicronetError
from micronet.packed.checks import check_about
from micronet.packed.program import Program
from micronet.runtimes.ncnn.kinds import KINDS, infer, macs, tensor_sizes
from micronet.runtimes.ncnn.layer import ARRAY, LONGEST_NAME, MAGIC, TAGS, WITH_TAG, Layer, Parameter, clean
from micronet.runtimes.ncnn.lowering import INPUT, Lowered, lower
from micronet.runtimes.ncnn.shapes import Blob

PARAM, BIN = "network.param", "network.bin"
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


def write_ncnn(program: Program, folder: Path, *, fp16_storage: bool = False) -> dict[str, Any]:
    """Write a network's files into a folder, which is created.

    Args:
        program: What ``pack`` makes of a network.
        folder: Where to write.
        fp16_storage: Store float weights as float16: half as large, and rounded to 11 bits.

    Returns:
        What a user of the files needs to know: names and shapes of blobs, how to normalize pixels, what is int8.

    Raises:
        MicronetError: ncnn cannot run the network; names every operation that it cannot run and what to do. Nothing is
            written then.
    """
    found = lower(program, fp16_storage)
    blobs = {blob for layer in found.layers for blob in layer.outputs}
    lines = [MAGIC, f"{len(found.layers)} {len(blobs)}", *(layer.line for layer in found.layers)]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / BIN, b"".join(layer.data for layer in found.layers))
    write_bytes(folder / PARAM, ("\n".join(lines) + "\n").encode())
    return {"fp16_storage": fp16_storage, **_described(program, found)}


def _described(program: Program, found: Lowered) -> dict[str, Any]:
    """Return the names of blobs, how to normalize pixels, what is int8, and what the program says of itself."""
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


def read(folder: Path, note: dict[str, Any]) -> NcnnFile:
    """Read and check the files of a network that ``write_ncnn`` wrote.

    Args:
        folder: Where they are.
        note: What ``write_ncnn`` returned.

    Raises:
        MicronetError: One is missing, was not written by micronet, or is damaged.
        FailedError: A weight is NaN or infinite.
    """
    for name in (PARAM, BIN):
        if not (folder / name).is_file():
            raise MicronetError(f"{folder / name} does not exist; an ncnn network has {PARAM} and {BIN}; {AGAIN}")
    try:
        param, data = read_text(folder / PARAM).encode(), (folder / BIN).read_bytes()
        layers, blobs = _parse(param.decode())
        _take_tensors(layers, data)
        if [note["input"]["blob"], *note["outputs"]] != [INPUT, *(f"out{n}" for n in range(len(note["outputs"])))]:
            raise ValueError("its inputs or outputs are not the ones that micronet names")
        if not note["outputs"] or any(blob not in blobs for blob in note["outputs"]):
            raise ValueError("it computes no output")
        check_about(note["about"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise MicronetError(
            f"{folder} is not an ncnn network that micronet wrote, or is damaged ({error}); {AGAIN}"
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
