"""The plan of ``quantize --dry-run``: which quantizers every layer would get."""

from typing import Any

from micronet.artifact.artifact import Artifact
from micronet.artifact.layers import describe_slot
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.stages.inputs import example_input


def plan(artifact: Artifact, config: QuantConfig) -> list[dict[str, Any]]:
    """Return one row per layer: the quantizers of its weight and its input, or why it stays float."""
    placed = quantize_model(artifact.model, config, example_input(artifact))[1].result
    rows = []
    for name, source in placed["inputs"].items():
        weight = placed["quantizers"].get(name, {}).get("weight_quantizer")
        module, _, slot = (source or "").rpartition(".")
        activation = placed["quantizers"].get(module, {}).get(slot)
        at_input = f"{describe_slot(activation)}, at {module}" if activation else "float"
        rows.append((name, describe_slot(weight) if weight else "float", at_input, ""))
    rows += [(name, "float", "float", why) for name, why in placed["left_float"].items()]
    return [dict(zip(("layer", "weight", "input", "note"), row, strict=True)) for row in rows]
