"""Which layers of an ONNX file lose the most accuracy in integers."""

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape
from shlex import quote

import onnx

from micronet.core.progress import Progress, reported
from micronet.errors import MicronetError, count
from micronet.onnx.feeds import Feed
from micronet.onnx.graph_view import GraphView
from micronet.onnx.sessions import one_sample
from micronet.quantization.config import EXCLUDED
from micronet.stages.onnx_files import closeness, compare_files, open_files

Requantize = Callable[[dict[str, str]], onnx.ModelProto]  # layers to leave in float -> why: the quantized model
MOST_GROUPS = 32  # of layers that are quantized together
RUNS = 2  # of the calibration inputs, a sample of each
SHARE = 0.1  # of the noise, which may stay
MOST_NAMED = 8


def layer_names(proto: onnx.ModelProto) -> list[str]:
    """Return the names of the layers with stored weights, as ``quantize --exclude`` takes them."""
    return [str(layer.node.name) for layer in GraphView(proto).layers]


def error_of(
    folded: onnx.ModelProto, requantize: Requantize, others: Iterable[str], feeds: Sequence[Feed]
) -> float | None:
    """Return the outputs' relative error if some layers stay in float; None if all of them do anyway.

    Args:
        folded: A float model from ``prepare``.
        requantize: Quantizes it, but for some layers.
        others: Those to leave in float.
        feeds: The inputs.
    """
    try:
        return compare_files(folded, requantize(dict.fromkeys(others, EXCLUDED)), feeds)["error"]
    except MicronetError:
        return None


def describe_destroyers(
    folded: onnx.ModelProto, requantize: Requantize, feeds: Sequence[Feed], progress: Progress
) -> str:
    """Say which layers make most of the noise, each measured alone, and how close the outputs are with these in float.

    The arguments are as in ``error_of``. Returns nothing if it is not a few layers that make the noise.
    """
    session = open_files(folded)[0]
    sampled = [one_sample(session, feed) for feed in feeds[:: max(1, len(feeds) // RUNS)][:RUNS]]
    names = layer_names(folded)
    size = max(1, math.ceil(len(names) / MOST_GROUPS))
    groups = [tuple(names[start : start + size]) for start in range(0, len(names), size)]
    while True:
        noise = {}
        for group in reported(groups, "looking for the layers that lose accuracy", progress):
            others = [name for name in names if name not in group]
            noise[group] = (error_of(folded, requantize, others, sampled) or 0.0) ** 2
        worst = _worst(noise)
        if all(len(group) == 1 for group in worst):
            break
        groups = [(name,) for group in worst for name in group]
    patterns = _patterns([name for group in worst for name in group])
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not 0 < len(found) < len(names):
        return ""
    try:
        better = compare_files(folded, requantize(dict.fromkeys(found, EXCLUDED)), feeds)
    except MicronetError:  # nothing else can be quantized
        return ""
    option = f"--exclude {quote(','.join(patterns))}"
    return f"most of the noise is from {count(len(found), 'layer')}: {option} gives {closeness(better)}"


def _patterns(names: list[str]) -> list[str]:
    """Return what --exclude takes for layers: their names, or what more than ``MOST_NAMED`` of them begin with."""
    if len(names) <= MOST_NAMED:
        return [escape(name).replace(",", "?") for name in names]
    first = names[0]
    folders = [first[: end + 1] for end in range(len(first)) if first[end] in "/."]
    shared = [folder for folder in folders if all(name.startswith(folder) for name in names)]
    return [f"{escape(shared[-1])}*"] if shared else []


def _worst(noise: dict[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    """Return the noisiest groups of layers, as many as leave at most ``SHARE`` of the noise to the others."""
    chosen, left = [], sum(noise.values())
    allowed = SHARE * left
    for group in sorted(noise, key=lambda each: -noise[each]):
        if left <= allowed:
            break
        chosen.append(group)
        left -= noise[group]
    return chosen
