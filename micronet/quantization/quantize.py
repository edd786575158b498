"""Quantizing a network: the choice of which tensors are quantized, and which module holds each quantizer.

There is one quantizer per tensor. A tensor is identified by its origin, the graph node that computed its values, and
the quantizer sits in the output slot of that node's module, so all readers see the same numbers. The inputs of
convolutions, linear layers and average pools are quantized, and so are the inputs of adds and concatenations that a
runtime computes in integers (see ``integer_joins``). A layer that reads another sum has a quantizer of its own. In a
network that cannot be traced, only the layers' own inputs are quantized.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict

import torch
from torch import nn

from micronet.artifact.header import StageRecord
from micronet.core.progress import Progress, Silent
from micronet.errors import MAX_NAMES, MicronetError, by_reason, listed
from micronet.graph import ops
from micronet.graph.trace import trace, trace_both, trace_modes
from micronet.models import transformer
from micronet.models.cells import is_cell
from micronet.models.computed import is_computed
from micronet.models.device import Example
from micronet.models.inputs import TORCHSCRIPT
from micronet.models.modes import copy_model
from micronet.quantization.calls import COMPUTED_WEIGHT, float_calls
from micronet.quantization.config import FIRST_OR_LAST, NO_DEFORMABLE, QuantConfig
from micronet.quantization.dry_run import find_idle, find_infinite, keeps_outputs
from micronet.quantization.graph_placer import GraphPlacer
from micronet.quantization.layers import has_weight_slot, is_complex
from micronet.quantization.placement import Placement
from micronet.quantization.placer import LayerPlacer
from micronet.quantization.quantizer import Quantizer

UNCALLED = "forward() never calls it as a module"
TRAINING_ONLY = "forward() calls it in training mode only"
_LAYERS = {kind.__name__ for kind in (*ops.CONVOLUTIONS, nn.Linear)}


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    example: Example | None = None,
    infinite: Collection[str] = (),
    progress: Progress | None = None,
    batches: Collection[Example] = (),
) -> tuple[nn.Module, StageRecord]:
    """Return a copy of a float network with quantizers placed, and the record that rebuilds it.

    The quantizers have no ranges yet: call ``calibrate``, or train inside ``observing``. The layers that stay float are
    in ``record.result["left_float"]``, a dictionary from layer name to reason, and so are tensors with infinities.

    Args:
        model: The network.
        config: Which tensors are quantized, and how.
        example: An input, or a tuple of inputs. A forward that torch.fx cannot trace symbolically is traced while it
            runs on the example; without one, only the layers' own inputs are quantized. Quantizers without effect on
            the example's output, and on that of ``batches``, are removed, and their layers stay float.
        infinite: Quantizers, ``module.slot``, not to place, because infinity reaches them on other inputs.
        progress: Where to report progress: tracing and checking run the network several times.
        batches: More inputs, for layers that the example does not reach.

    Raises:
        MicronetError: Nothing in the network can be quantized, or its output for the example is empty.
    """
    progress = progress or Silent()
    progress.step("tracing the network", 0, 1)
    placement = _place(model, config, example, infinite)
    quantized = placement.apply(copy_model(model))
    comparable = example if config.a_bits != "binary" else None  # its quantizers take the place of ReLUs
    if comparable is not None and not keeps_outputs(model, quantized, comparable):
        progress.line(
            "warning: the trace of this network computes something else than its forward(), so only the weights and "
            "the inputs of its layers are quantized, and the network may be refused by export-onnx"
        )
        placement = _place(model, config, None, infinite, traced=False)
        quantized = placement.apply(copy_model(model))
    if example is not None and (found := find_infinite(quantized, [example])):
        return quantize_model(model, config, example, {*infinite, *found}, progress, batches)
    if example is not None and (idle := find_idle(quantized, example, progress, batches)):
        placement.remove(idle)
        if not placement.inputs:
            raise MicronetError(f"nothing can be quantized: {'; '.join(dict.fromkeys(idle.values()))}")
        quantized = placement.apply(copy_model(model))
    return quantized, StageRecord("quantize", config.to_json(), asdict(placement))


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Return the model with the quantizers that a record describes, uncalibrated."""
    placement = Placement.from_json(record.result)
    model = placement.apply(model)
    for layer, source in placement.inputs.items():
        if source is not None and not isinstance(model.get_submodule(source), Quantizer):
            raise ValueError(f"the input of {layer} is quantized by {source}, which is no quantizer")
    return model


def _splits(model: nn.Module) -> list[list[str]]:
    """Return the layers to try to split: all attentions and cells, or those of one kind."""
    every, attentions = transformer.splittable_layers(model), transformer.splittable_attentions(model)
    cells = [name for name in every if name not in attentions]
    return [every, attentions, cells] if attentions and cells else [every] if every else []


def _place(
    model: nn.Module, config: QuantConfig, example: Example | None, infinite: Collection[str], *, traced: bool = True
) -> Placement:
    graph, split = None, list[str]()
    for split in _splits(model) if traced else []:  # a forward may read their own tensors
        if (graph := trace(transformer.with_split_layers(model, split), example)) is not None:
            break
    else:
        split, graph = [], (trace(model, example) or trace_both(model, example)) if traced else None
    placement = (
        LayerPlacer(model, config, infinite) if graph is None else GraphPlacer(graph, config, infinite)
    ).placement
    placement.attention = split
    if graph is not None:
        placement.plain, placement.recorded = bool(graph.plain), graph.recorded
    elif (evaluated := trace_modes(model)) is not None:  # in which calls may be all that the network computes
        placement.left_float |= float_calls(evaluated, placement.inputs)
    training = set() if graph is None else {str(node.target) for node in graph.training.nodes}
    network = model if graph is None else graph.model
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            placement.left_float[name] = "MultiheadAttention uses packed weights"
        elif has_weight_slot(module):
            if name not in placement.inputs:
                why = TRAINING_ONLY if name in training else _inside_leaf(name, network) or UNCALLED
                placement.left_float.setdefault(name, why)
        elif ops.full_name(type(module)) == ops.DEFORMABLE_MODULE:
            placement.left_float[name] = NO_DEFORMABLE
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name in _LAYERS:
            placement.left_float[name] = f"it is part of {TORCHSCRIPT}"
        elif isinstance(module, (*ops.CONVOLUTIONS, nn.Linear)) and is_complex(module):
            placement.left_float[name] = "its weights are complex numbers"
        elif is_cell(module):
            placement.left_float[name] = "forward() reads its own tensors, or cannot be traced"
        elif isinstance(module, (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)):
            placement.left_float[name] = (
                COMPUTED_WEIGHT if is_computed(module) else f"{type(module).__name__} has no int8 form"
            )
    if not placement.inputs:
        raise _nothing_placed(placement.left_float)
    return placement


def _inside_leaf(name: str, model: nn.Module) -> str:
    """Return that a layer is inside a module that stays as it is, or ""."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(1, len(parts)))
    found = next((owner for owner in owners if getattr(model.get_submodule(owner), "is_leaf", False)), "")
    return f"is_leaf leaves {found} as it is" if found else ""


def _nothing_placed(left_float: Mapping[str, str]) -> MicronetError:
    """Return the error for a network whose layers all stay float, for these reasons."""
    reasons = by_reason(left_float)
    if not reasons:
        return MicronetError(
            "the network has no convolution or linear layers to quantize; define them as modules, not function calls"
        )
    named = "; ".join(f"{listed(names, MAX_NAMES)} ({why})" for why, names in reasons.items())
    cure = "; to quantize the first and last layers, too, add --first-last 8bit" if FIRST_OR_LAST in reasons else ""
    return MicronetError(f"no layer would be quantized: {named}{cure}")
