"""What an operation does to channels."""

from torch import fx, nn

from micronet.graph import ops

KINDS = {
    "metadata": ops.METADATA,
    "creating": ops.CREATES,
    "moving": ops.MOVES_CHANNELS,
    "combining": ops.MATCHES_CHANNELS,
    "gating": ops.GATES,
    "attending": ops.MIXES_HEADS,
    "reducing": ops.REDUCES,
    "pooling": ops.POOLS_CHANNELS,
}
_ATTRIBUTES = {
    **dict.fromkeys(ops.METADATA_ATTRIBUTES, "metadata"),
    **dict.fromkeys(ops.TRANSPOSING_ATTRIBUTES | ops.TUPLE_ATTRIBUTES | ops.VALUE_ATTRIBUTES, "moving"),
    **dict.fromkeys(ops.COMPLEX_ATTRIBUTES, "combining"),
}


def kind_of(node: fx.Node, module: nn.Module | None) -> str:
    """Return one of ``KINDS``, or "" if no table names the operation; ``module``: the one that the node calls."""
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]), "")
    return next((kind for kind, family in KINDS.items() if family.matches(node, module)), "")
