"""What micronet writes into ONNX files beside the graph: the network's model, data and history, as JSON."""

import json
from collections.abc import Mapping
from typing import Any

import onnx

from micronet.core.parse import parse_json

METADATA_KEY = "micronet"


def metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return what micronet wrote into a model (``data``, ``history``, …), or nothing for other models."""
    return parsed(next((entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY), "{}"))


def left_float(proto: onnx.ModelProto) -> dict[str, str] | None:
    """Return the layers that micronet left in float and why; None for files in which it did not write that."""
    found = metadata(proto).get("left_float")
    return {str(name): str(why) for name, why in found.items()} if isinstance(found, dict) else None


def reason_in(reasons: Mapping[str, str], node: str) -> str | None:
    """Return the reason for a node of a file from those by layer: a layer's nodes have its name and a suffix."""
    return next((why for name, why in reasons.items() if node == name or node.startswith(f"{name}.")), None)


def note(proto: onnx.ModelProto, **about: Any) -> None:
    """Add to what micronet wrote into a model, in place."""
    known = {entry.key: entry.value for entry in proto.metadata_props}
    written = json.dumps({**parsed(known.get(METADATA_KEY, "{}")), **about}, sort_keys=True)
    onnx.helper.set_model_props(proto, {**known, METADATA_KEY: written})


def parsed(text: str) -> dict[str, Any]:
    """Return what a text says that ``note`` wrote; nothing if it is damaged."""
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("data") or {}, dict):
        return {}
    records = found.get("history")
    valid = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    return {**found, "history": records if valid else []}
