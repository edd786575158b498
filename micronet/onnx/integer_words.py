"""What every command says of a quantized ONNX file: what runs in integers, what does not and why, and how fast."""

from typing import Any

from micronet.core.timing import is_no_faster, is_slower
from micronet.errors import by_reason, count, listed
from micronet.onnx.channel_padding import WIDTH
from micronet.onnx.integers import FLOAT_TRANSPOSED, FLOAT_WEIGHTS, NO_TRANSPOSED

_LISTED = 3
_NOUNS = {"convolutions": "convolution", "linear": "linear layer", "recurrent": "recurrent layer"}
# Measured: with integers in q k^T alone, attention takes 1.3 to 1.5 times as long.
PRODUCTS = "integers are faster there only if softmax has 8 bits too, which would lose small probabilities"


def describe(found: dict[str, Any], runtime: str = "ONNX Runtime") -> list[str]:
    """Return lines on a quantized network, faults first: outputs that may be wrong, a file that is slower or larger.

    ``found``: what ``integers.count_computed`` returns, with what ``speed.measure_speed`` does if that was measured;
    ``saturating``: layers whose sums can saturate on this processor.
    """
    return [*describe_saturation(found), *describe_integers(found, runtime)]


def describe_saturation(found: dict[str, Any]) -> list[str]:
    """Return a line on the layers whose sums can saturate, if there are any; ``found``: see ``describe``."""
    if not (saturating := found.get("saturating")):
        return []
    return [
        f"sums in {count(len(saturating), 'layer')} can saturate in OpenVINO on this processor, which has no VNNI; "
        "the outputs may be far off; quantize with --w-bits 7 --first-last same, or use ONNX Runtime"
    ]


def describe_integers(found: dict[str, Any], runtime: str = "ONNX Runtime") -> list[str]:
    """Return lines on what runs in integers, and how fast; ``found``: see ``describe``."""
    lines = [_counts(found, runtime)]
    for reason, layers in by_reason(found["float"]).items():
        lines.append(f"float: {listed(layers, _LISTED)}: {reason}")
    if products := found.get("products"):
        why = f", as in attention: {PRODUCTS}" if found.get("attends") else ": only products with weights are quantized"
        lines.append(f"float: {count(products, 'product')} of two activations{why}")
    if padded := found.get("padded"):
        cure = f"; for a smaller file, prune with --regular {WIDTH}" if found.get("from_artifact") else ""
        lines.append(
            f"{count(padded, 'depthwise convolution')} padded with zeros to a multiple of {WIDTH} channels, which ONNX "
            f"Runtime computes at a time{cure}"
        )
    if "int8_bytes" in found:
        sizes = f"{found['int8_bytes']:,} bytes vs. {found['float_bytes']:,}"
        lines.insert(0, f"larger than in float: {sizes}; {found['growth']}")
    ours, theirs = found.get("int8_ms", 0), found.get("float_ms", 0)
    if (slower := is_slower(ours, theirs)) or is_no_faster(ours, theirs):
        degree = "slower" if slower else "no faster"
        lines.insert(0, f"{degree} than float: {ours:.2f} ms vs. {theirs:.2f} ms; {slow_cause(found)}")
    return lines


def _counts(found: dict[str, Any], runtime: str) -> str:
    """Say how many layers and operators run in integers, and the times, if they were measured."""
    kinds = [(found[kind], noun) for kind, noun in _NOUNS.items() if found.get(kind, {}).get("all")]
    parts = [f"{numbers['integer']} of {count(numbers['all'], noun)}" for numbers, noun in kinds]
    if found.get("operators"):
        parts.append(f"{found['integer_operators'] / found['operators']:.0%} of all operators")
    line = f"{' and '.join(filter(None, (', '.join(parts[:-1]), *parts[-1:])))} run in integer arithmetic"
    if "int8_ms" in found:
        line += f"; {found['int8_ms']:.2f} ms vs. {found['float_ms']:.2f} ms in float"
        line += f" ({runtime}, 1 thread, batch {found.get('batch', 1)})"
    return line


def slow_cause(found: dict[str, Any]) -> str:
    """Return why a quantized file is slower than in float, and what helps; ``found``: what was counted."""
    meant = (FLOAT_WEIGHTS, NO_TRANSPOSED, FLOAT_TRANSPOSED)
    others = [name for name, why in found["float"].items() if why not in meant]
    if found.get("dequantized", others):
        return (
            "the layers below are computed in float on dequantized weights; exclude them with micronet quantize "
            "--exclude"
        )
    if narrow := found.get("narrow"):
        return (
            f"ONNX Runtime computes convolutions of few channels, or few in a group, more slowly in integers "
            f"({listed(narrow, _LISTED)}); exclude them with micronet quantize --exclude"
        )
    ways = "use the float network, or find the layers that are faster in float with micronet compress"
    cost = "quantizing and dequantizing between them costs more than integers save"
    if found.get("activations"):
        cost = f"the cost of {' and '.join(found['activations'])} between them outweighs the savings"
        ways = f"use ReLU instead, or {ways}"
    integer, every = (sum(found.get(kind, {}).get(key, 0) for kind in _NOUNS) for key in ("integer", "all"))
    layers = "these layers" if 2 * integer >= every else f"only {integer} of {count(every, 'layer')}"
    return f"{layers} run in integer arithmetic, but {cost}; {ways}"
