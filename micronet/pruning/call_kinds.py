"""What a call in a traced forward does to channels."""

from typing import Any

from torch import fx

from micronet.graph import ops

_KINDS = {
    "metadata": ops.METADATA,
    "moving": ops.MOVES_CHANNELS,
    "combining": ops.MATCHES_CHANNELS,
    "attending": ops.MIXES_HEADS,
    "reducing": ops.REDUCES,
    "pooling": ops.POOLS_CHANNELS,
}
_ATTRIBUTES = dict.fromkeys(ops.METADATA_ATTRIBUTES, "metadata") | dict.fromkeys(ops.TRANSPOSING_ATTRIBUTES, "moving")


def call_kind(node: fx.Node) -> str:
    """Return what a function or method call does to channels, one of ``_KINDS``, or "" if that is unknown."""
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]), "")
    return next((kind for kind, family in _KINDS.items() if family.matches(node)), "")


def is_softmax(node: fx.Node) -> bool:
    """Return True if a reducing node keeps its axes: a softmax as a module, a function or a method."""
    return node.op == "call_module" or ops.SOFTMAX.matches(node)


def batched_rank(operation: Any) -> int | None:
    """Return the rank of an operation's batched input by its name (``MaxPool2d``: 4), or None if any rank will do."""
    name = getattr(operation, "__name__", type(operation).__name__)
    if name[-2:] not in ("1d", "2d", "3d") or isinstance(operation, ops.BATCH_NORMS):  # BatchNorm1d takes two ranks
        return None
    return int(name[-2]) + 2


def writes_part(node: fx.Node) -> bool:
    """Return True if a node writes into part of a tensor that others may read as a whole."""
    method = str(node.target) if node.op == "call_method" else ""
    in_place = method.endswith("_") and not method.endswith("__")
    if not (in_place or node.target in ops.IN_PLACE or node.kwargs.get("inplace")):
        return False
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and ops.PART.matches(source)


def why_pinned(operation: Any) -> str:
    """Return why a module or a function keeps its channels from being cut."""
    normalizes = ops.NORMALIZES_CHANNELS
    if isinstance(operation, normalizes.modules) or operation in normalizes.functions:
        return "normalizes over its channels, so each one depends on all others"
    return "is not supported by pruning"
