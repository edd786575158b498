"""The layers of an artifact, from its header alone."""

import math
from typing import Any, NamedTuple

from micronet.artifact.header import Header
from micronet.core.tensor_file import TensorInfo

_SLOT_SUFFIX = "_quantizer"


class LayerRow(NamedTuple):
    """A module with tensors of its own: weight shape, parameters, stored bytes, and how it is quantized."""

    name: str
    shape: str
    params: int
    size_bytes: int
    quantization: str


def layer_table(header: Header, tensors: dict[str, TensorInfo]) -> list[LayerRow]:
    """Return one row per module that has tensors, sorted by name."""
    described: dict[str, dict[str, Any]] = {}
    for record in header.history:
        for module, slots in record.quantizers.items():
            described.setdefault(module, {}).update(slots)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        owner, leaf = _owner(name)
        modules.setdefault(owner, {})[leaf] = info
    return [
        LayerRow(
            name,
            "x".join(map(str, own["weight"].shape)) if "weight" in own else "",
            sum(math.prod(own[leaf].shape) for leaf in ("weight", "bias") if leaf in own),
            sum(info.size_bytes for info in own.values()),
            ", ".join(
                f"{slot.removesuffix(_SLOT_SUFFIX)} {describe_slot(quantizer)}"
                for slot, quantizer in described.get(name, {}).items()
            ),
        )
        for name, own in sorted(modules.items(), key=lambda item: _natural(item[0]))
    ]


def _owner(name: str) -> tuple[str, str]:
    """Split a tensor's name into module and rest; a quantizer's tensors belong to the module that holds it."""
    parts = name.split(".")
    end = next((index for index, part in enumerate(parts) if part.endswith(_SLOT_SUFFIX)), len(parts) - 1)
    return ".".join(parts[:end]), ".".join(parts[end:])


def describe_slot(quantizer: dict[str, Any]) -> str:
    """Return a recorded quantizer in a few words: ``8-bit sym signed per channel``, ``sign``."""
    words = [f"{quantizer['bits']}-bit"] if "bits" in quantizer else []
    if quantizer["scheme"] != "iao":
        words.append(quantizer["scheme"])
    if "symmetric" in quantizer:
        words.append("sym" if quantizer["symmetric"] else "asym")
    if "signed" in quantizer:
        words.append("signed" if quantizer["signed"] else "unsigned")
    if "axis" in quantizer:
        words.append("per channel" if quantizer["axis"] is not None else "per tensor")
    return " ".join(words)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
