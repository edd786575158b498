"""What micronet writes into ONNX files beside the graph: the network's model, data and history, as JSON."""

import json
from typing import Any

import onnx

from micronet.core.parse import parse_json

METADATA_KEY = "micronet"


def metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return what micronet wrote into a model (``data``, ``history``, …), or nothing for other models."""
    return parsed(next((entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY), "{}"))


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
