"""Batch-norm folding: a batch norm becomes part of the convolution or linear layer before it.

With k = gamma / sqrt(running_var + eps): w' = k * w, b' = (b - running_mean) * k + beta (Jacob et al. 2017,
arXiv:1712.05877, section 3.2). A quantized layer keeps its integers: each channel's scale is multiplied by |k|, a
negative k negates integers and zero point, k = 0 makes the channel zero, and a scale per layer becomes one per channel.
If only the sign of the output is used, every channel is divided by |k| first: w' = w sign(k), and b' is a threshold
(k = 0: the sign of beta). Biases are rounded to the unit of an integer runtime's sums, which moves an output by a few
thousandths of its step at most.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from micronet.artifact.header import StageRecord
from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.graph.record import record_network
from micronet.graph.trace import Graph, plain_network, trace, trace_modes
from micronet.models.device import Example
from micronet.models.layers import Tap, removed
from micronet.models.modes import copy_model
from micronet.quantization.functional import broadcast, dequantize, int8_grid
from micronet.quantization.layers import (
    Quantized,
    channel_axis,
    effective_weight,
    give_bias,
    norm_factor,
    quantized,
    replace_modules,
)  # fmt: skip
from micronet.quantization.quantizer import Quantizer, rebuild
from micronet.quantization.schemes.wbwtab import SignQuantizer


def fold_model(
    model: nn.Module, history: Sequence[StageRecord] = (), example: Example | None = None
) -> tuple[nn.Module, StageRecord]:
    """Return a copy of a network with every foldable batch norm folded, and the record that rebuilds it.

    Args:
        model: A network, float or quantized.
        history: Its records. They name the quantizer of each layer's input, which is needed to round the biases of a
            quantized network. Biases are rounded even if all batch norms were folded before quantization.
        example: An input, or a tuple of inputs, for a forward that must run to be traced.

    Raises:
        MicronetError: The network cannot be traced, or it is a float one without batch norms to fold.
    """
    graph = _fold_graph(copy_model(model), example)
    if graph is None:
        if example is not None:
            record_network(copy_model(model), example)  # raises, with the line that stopped it
        raise MicronetError(
            "torch.fx cannot trace this network, so its batch norms cannot be matched to layers; use the artifact as "
            "it is"
        )
    return _fold(graph, history)


def fold_if_any(model: nn.Module, example: Example | None = None) -> nn.Module:
    """Return a copy of a network with every foldable batch norm folded; the network itself if it has none."""
    graph = _fold_graph(copy_model(model), example)
    return _fold(graph)[0] if graph is not None and _has_norms(graph, model) else model


def _fold(graph: Graph, history: Sequence[StageRecord] = ()) -> tuple[nn.Module, StageRecord]:
    """Fold every foldable batch norm of a traced network, in place; see ``fold_model``."""
    folded = graph.model
    pairs = foldable_pairs(graph)
    absorbed = [name for name, module in folded.named_modules() if _absorbs_norm(module)]
    others = {str(node.target) for node, _ in graph.calls() if not _only_signs_read(graph, node, in_place=True)}
    for layer_name, norm_name in pairs:
        signed = norm_name not in others
        _fold_pair(folded.get_submodule(layer_name), folded.get_submodule(norm_name), before_sign=signed)
    for name in absorbed:
        _fold_absorbed(folded.get_submodule(name))
    folded = _remove_norms(folded, pairs)
    changed = [*(name for name, _ in pairs), *absorbed]
    found = {name: getattr(folded.get_submodule(name), "weight_quantizer", None) for name in changed}
    quantizers = {name: quantizer.describe() for name, quantizer in found.items() if quantizer is not None}
    rounded = [name for record in history for name in _round_biases(folded, record.result.get("inputs", {}))]
    left = left_norms(graph, pairs)
    quantized_before = any(record.stage == "quantize" for record in history)  # then any network may be fused
    if not pairs and not absorbed and not quantized_before:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3]) or "it has no batch norms"
        raise MicronetError(f"nothing to fold in this network ({why}); use the artifact as it is")
    result: dict[str, Any] = {"pairs": [list(pair) for pair in pairs], "taken": absorbed, "quantizers": quantizers}
    result |= {"rounded": len(rounded)} if rounded else {}
    result |= {"left": left} if left else {}
    result |= {"plain": True} if graph.plain else {}
    result |= {"recorded": graph.recorded} if graph.recorded else {}
    return folded, StageRecord("bn-fuse", {}, result)


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Return the model with the structure that a record describes; the values come from the file."""
    if record.result.get("plain") or record.result.get("recorded"):
        model = plain_network(model, record.result.get("recorded"))
    for layer_name in [*(pair[0] for pair in record.result["pairs"]), *record.result.get("taken", [])]:
        give_bias(model.get_submodule(layer_name))
    model = _remove_norms(model, record.result["pairs"])
    for layer_name in record.result.get("taken", []):
        model.get_submodule(layer_name).norm = None  # type: ignore[assignment]
    for layer_name, description in record.result["quantizers"].items():
        layer: Any = model.get_submodule(layer_name)
        layer.weight_quantizer = rebuild(description, layer.weight)
    return model


@torch.no_grad()
def _fold_pair(layer: Any, norm: Any, *, before_sign: bool) -> None:
    """Fold a batch norm into the layer before it, in place; ``before_sign``: only the sign of the output is used."""
    std = (norm.running_var.double() + norm.eps).sqrt()
    gain = norm.weight.double() if norm.affine else torch.ones_like(std)
    shift = norm.bias.double() if norm.affine else torch.zeros_like(std)
    factor = gain / std
    if before_sign:
        size = torch.where(factor == 0, 1.0, factor.abs())
        factor, shift = factor / size, shift / size
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(std)
    dtype = layer.weight.dtype
    quantizer: Quantizer | None = getattr(layer, "weight_quantizer", None)
    if quantizer is None:
        layer.weight.copy_(layer.weight * _per_output(layer, factor))
    else:
        old, axis = quantizer.qparams(layer.weight), channel_axis(layer)
        levels = quantizer.integers(layer.weight) - broadcast(old.zero_point, layer.weight, old.axis)
        layer.weight_quantizer = quantizer.scaled(factor.to(dtype), layer.weight, axis)
        new = layer.weight_quantizer.qparams(layer.weight)
        flipped = levels * broadcast(factor.to(dtype).sign(), layer.weight, axis)
        layer.weight.copy_(dequantize(flipped + broadcast(new.zero_point, layer.weight, axis), new))
    folded = ((bias - norm.running_mean.double()) * factor + shift).to(dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(folded)
    else:
        layer.bias.copy_(folded)


@torch.no_grad()
def _fold_absorbed(layer: Any) -> None:
    """Make permanent the fold of a batch norm that a convolution folds while training; integers do not change."""
    factor = norm_factor(layer.norm, nonzero=False)
    weight = effective_weight(layer)
    scaled = layer.weight_quantizer.scaled(torch.ones_like(factor), weight, 0)
    grid = layer.weight_quantizer.qparams(weight)
    layer.weight.copy_(dequantize(layer.weight_quantizer.integers(weight), grid))
    bias = layer.norm.bias - layer.norm.running_mean * factor
    layer.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias * factor)
    layer.norm = None
    layer.weight_quantizer = scaled


def can_fold(model: nn.Module, example: Example | None = None) -> bool:
    """Return whether ``fold_model`` finds a batch norm to fold, or one that a layer folds while training."""
    graph = _fold_graph(copy_model(model), example)
    return graph is not None and _has_norms(graph, model)


def _has_norms(graph: Graph, model: nn.Module) -> bool:
    """Return whether a network, or its graph, has a batch norm to fold, or one that a layer folds while training."""
    return bool(foldable_pairs(graph)) or any(map(_absorbs_norm, model.modules()))


def _fold_graph(model: nn.Module, example: Example | None) -> Graph | None:
    """Return the graph in which ``fold_model`` looks for batch norms; None if the network cannot be traced."""
    return trace(model, example) or trace_modes(model)


def foldable_pairs(graph: Graph) -> list[tuple[str, str]]:
    """Return the names of the (layer, batch norm) pairs that ``fold_model`` folds."""
    return [pair for pair in graph.conv_bn_pairs() if not shares_scales(graph.model.get_submodule(pair[0]))]


def left_norms(graph: Graph, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the batch norms that are in none of the (layer, batch norm) pairs: name -> why it cannot be folded."""
    folded = {name for _, name in pairs}
    found = {}
    for node, norm in graph.calls():
        if isinstance(norm, ops.BATCH_NORMS) and str(node.target) not in folded:
            found[str(node.target)] = _obstacle(graph, node, norm)
    return found


def _obstacle(graph: Graph, node: fx.Node, norm: Any) -> str:
    """Return why a batch norm cannot be folded into what it reads."""
    before = node.all_input_nodes[0]
    while isinstance(graph.module(before), Tap):
        before = before.all_input_nodes[0]
    layer, name = graph.module(before), str(before.target)
    if not norm.track_running_stats:
        return "it has no running mean and variance"
    if layer is None:
        called = before.target if isinstance(before.target, str) else getattr(before.target, "__name__", before.name)
        return "it follows an input" if before.op == "placeholder" else f"it follows {called}()"
    if not isinstance(layer, (*ops.CONVOLUTIONS, nn.Linear)):
        return f"it follows {type(layer).__name__.removeprefix('Quantized')} {name}"
    if len(graph.readers(before)) > 1:
        return f"others read the output of {name} too"
    if not graph.owns_weight(layer):
        return f"the weight of {name} is used several times"
    if graph.call_count(layer) > 1 or graph.call_count(norm) > 1:
        return f"{name} and it are called several times, not always together"
    if shares_scales(layer):
        return f"the groups of {name} share weight scales"
    return f"the output of {name} is changed before it"


def _absorbs_norm(module: nn.Module) -> bool:
    return isinstance(module, Quantized) and module.norm is not None


def _only_signs_read(graph: Graph, node: fx.Node, *, in_place: bool) -> bool:
    """Return True if only signs read a tensor, through operations where positive factors per channel keep all signs.

    ``in_place``: the channels are still on their axis, so that a pool mixes no two of them.
    """
    quantizer = getattr(graph.module(node), "output_quantizer", None)
    if quantizer is not None:
        return isinstance(quantizer, SignQuantizer)
    return bool(node.users) and all(_keeps_signs(graph, user, in_place) for user in node.users)


def _keeps_signs(graph: Graph, node: fx.Node, in_place: bool) -> bool:
    module = graph.module(node)
    if isinstance(getattr(module, "input_quantizer", None), SignQuantizer):
        return True
    pools = graph.matches(node, ops.MAX_POOL | ops.AVERAGE_POOL)
    stays = pools or isinstance(module, (Tap, nn.ReLU, nn.Identity))
    passes = stays or graph.preserves_values(node)
    return passes and (in_place or not pools) and _only_signs_read(graph, node, in_place=in_place and stays)


def shares_scales(layer: Any) -> bool:
    """Return True if a layer's groups share weight scales, so that a factor per channel cannot be folded in."""
    grouped = getattr(layer, "transposed", False) and layer.groups > 1
    return grouped and getattr(layer, "weight_quantizer", None) is not None


@torch.no_grad()
def _round_biases(model: nn.Module, inputs: dict[str, str | None]) -> list[str]:
    """Round each quantized layer's bias to a multiple of input scale times weight scale; return the layers' names.

    An integer runtime adds the bias to its int32 sums in this unit (Jacob et al. 2017, equation 11). Without rounding
    here, about one value in two thousand would land on another level in each layer, and torch and the runtime would
    drift apart.
    """
    rounded = []
    for name, source in inputs.items():
        layer: Any = model.get_submodule(name)
        weight: Quantizer | None = getattr(layer, "weight_quantizer", None)
        if source is None or weight is None or layer.bias is None or shares_scales(layer):
            continue
        module, _, slot = source.rpartition(".")
        read: Quantizer = getattr(model.get_submodule(module), slot)
        if isinstance(read, SignQuantizer):  # rounding would change signs, and no runtime needs it
            continue
        unit = read.qparams(layer.weight).scale.double() * int8_grid(weight.qparams(layer.weight)).scale.double()
        layer.bias.copy_((layer.bias.double() / unit).round() * unit)
        rounded.append(name)
    return rounded


def _per_output(layer: Any, factor: Tensor) -> Tensor:
    """Reshape one factor per output channel to broadcast against the layer's weight."""
    if not getattr(layer, "transposed", False):
        return broadcast(factor, layer.weight, 0)
    # The weight of a transposed convolution is (in, out / groups, ...), with inputs ordered by group.
    rows = factor.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
    return rows.view(*rows.shape, *[1] * (layer.weight.dim() - 2))


def _remove_norms(model: nn.Module, pairs: Sequence[Sequence[str]]) -> nn.Module:
    """Return the network with identities in place of folded batch norms; output quantizers stay."""
    identities: dict[nn.Module, nn.Module] = {}
    for _, name in pairs:
        norm = model.get_submodule(name)
        identity = removed(norm)
        if isinstance(norm, Quantized) and norm.output_quantizer is not None:
            identity = quantized(identity)
            identity.output_quantizer = norm.output_quantizer
        identities[norm] = identity
    return replace_modules(model, identities)
