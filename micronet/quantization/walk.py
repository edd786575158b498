"""Front to back through a network in its float and its quantized form, with what each part and layer reads and gives.

What is done to a part or a layer shows in the inputs of the next. ``reconstruct`` and ``weight_scales`` use it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.models.device import Inputs
from micronet.quantization.blocks import Part, split
from micronet.quantization.layers import Quantized
from micronet.quantization.schemes.iao import AffineQuantizer

BATCH = 64  # images that run at a time
MEMORY = 3 << 30  # bytes of the tensors kept between two parts; where more are needed, fewer images are used
KEPT = 3  # such tensors: a part's input in both networks, and its output in one


class Place(NamedTuple):
    """A part of the network, what it reads in both networks, and what it gives in the float network.

    The tensors' first axis is the images. ``targets`` may be anything that a network can give if it is the last part.
    """

    part: Part
    inputs: Tensor
    plain: Tensor
    targets: Any


class LayerPlace(NamedTuple):
    """A layer in both networks, its quantized inputs in the quantized network, and its outputs in the float network."""

    layer: Any
    plain: nn.Module
    inputs: Tensor
    targets: Tensor


def parts_of(floating: nn.Module, quantized: nn.Module, batches: list[Any], option: str) -> tuple[list[Part], Tensor]:
    """Cut a network, in eval mode, into parts that hold the layers with weights on affine grids.

    Returns:
        The parts, and the images to use: all, or as many as fit into ``MEMORY``.

    Raises:
        MicronetError: The network has no such layer. The message names ``option``.
    """
    names = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, Quantized)
        and isinstance(module.weight_quantizer, AffineQuantizer)
        and isinstance(module, ops.ROW_LAYERS)
        and module.norm is None
    ]
    if not names:
        raise MicronetError(
            f"{option} found no uniformly quantized weights; use --method iao with --w-bits 2 to 16 and without "
            "--bn-fuse"
        )
    if isinstance(batches[0], Inputs):
        raise MicronetError(f"{option} only works for networks with one input; drop it")
    images = torch.cat(batches)
    parts, size = split(floating, quantized, call_order(quantized, names, images[:1]), images)
    return parts, images[: max(1, MEMORY // (KEPT * size))]


@torch.no_grad()
def walk(parts: list[Part], images: Tensor) -> Iterator[Place]:
    """Yield each part with its inputs; the next one's come from the part as it is by then."""
    inputs = plain = images
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        targets = None if last and not part.is_block else _run(part.floating, plain)
        yield Place(part, inputs, plain, targets)
        if not last:
            inputs, plain = _run(part.quantized, inputs), targets  # type: ignore[assignment]  # a tensor, if not last


def each_layer(place: Place) -> Iterator[LayerPlace]:
    """Yield the layers of a part in order; the next one's inputs come from the layer as it is by then.

    A layer that is called several times is left out, since its inputs may have several sizes.
    """
    for name in place.part.layers:
        inputs, targets = _record(place, name)
        if len(inputs) == len(targets) == -(-len(place.inputs) // BATCH):
            if inputs[-1].shape[1:] != inputs[0].shape[1:]:  # a smaller batch, and not on the first axis
                inputs, targets = inputs[:-1], targets[:-1]
            layer, plain = place.part.quantized.get_submodule(name), place.part.floating.get_submodule(name)
            yield LayerPlace(layer, plain, torch.cat(inputs), torch.cat(targets))


@torch.no_grad()
def call_order(model: nn.Module, names: Iterable[str], images: Tensor) -> list[str]:
    """Return the names of those layers that a forward pass calls, in the order of their first calls."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for name in names:
            watch = partial(lambda name, *_: order.setdefault(name), name)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(watch))
        model(images)
    return list(order)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part.clone()) for part in torch.split(x, BATCH)])  # a copy, since a ReLU may work in place


@torch.no_grad()
def _record(place: Place, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return a layer's inputs in the quantized network, and its outputs in the float network, batch by batch."""
    part, inputs, targets = place.part, [], []
    layer: Any = part.quantized.get_submodule(name)

    def record_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        inputs.append((x if layer.input_quantizer is None else layer.input_quantizer(x)).clone())

    def record_output(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        targets.append(out.clone())  # an in-place ReLU may follow

    hook = part.floating.get_submodule(name).register_forward_hook(record_output)
    with hook, layer.register_forward_pre_hook(record_input):
        for module, read in ((part.floating, place.plain), (part.quantized, place.inputs)):
            for batch in torch.split(read, BATCH):
                module(batch.clone())
    return inputs, targets
