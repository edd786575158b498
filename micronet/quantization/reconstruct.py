"""Reconstruction: quantized layers or blocks learn to give the float network's outputs, from unlabelled images.

Front to back, each with what the quantized network before it gives (``walk``). ``adaround`` learns one layer or block.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from micronet.core.progress import Progress, Silent
from micronet.errors import count
from micronet.models.modes import eval_mode
from micronet.quantization.adaround import Recorded, Unit, Work, learn_rounding, with_float_activations
from micronet.quantization.calibrate import each_quantizer
from micronet.quantization.layers import ACTIVATION_SLOTS
from micronet.quantization.schemes.iao import AffineQuantizer
from micronet.quantization.walk import Place, each_layer, parts_of, walk


@dataclass(frozen=True)
class Reconstruction:
    """What was reconstructed.

    Attributes:
        layers: How many layers have learned rounding.
        blocks: How many blocks were learned as one.
        alone: The layers that were learned one by one although blocks were asked for.
        images: The number of images used.
    """

    layers: int
    blocks: int
    alone: tuple[str, ...]
    images: int

    def __str__(self) -> str:
        text = f"learned the weight rounding of {count(self.layers, 'layer')}"
        if self.blocks:
            text += f" in {count(self.blocks, 'block')}"
        text += f" from {count(self.images, 'image')}"
        return f"{text}; not part of a block, so learned one by one: {', '.join(self.alone)}" if self.alone else text


def reconstruct(
    floating: nn.Module,
    quantized: nn.Module,
    batches: list[Tensor],
    form: Literal["layer", "block"],
    progress: Progress | None = None,
    seed: int = 1,
) -> Reconstruction:
    """Learn the rounding of every weight on an affine grid, in place.

    Args:
        floating: The float network.
        quantized: The same network, quantized and calibrated.
        batches: Calibration inputs.
        form: ``layer``: each layer keeps its own output, with the inputs that the quantized network gives it.
            ``block``: each block keeps its output, and the scales of the activations in it are learned too.
        progress: Where to report progress.
        seed: For the choice of images in each step.

    Raises:
        MicronetError: No layer has weights on an affine grid.
    """
    layers, blocks, alone = 0, 0, []
    with eval_mode(floating, quantized):
        parts, images = parts_of(floating, quantized, batches, f"--reconstruct {form}")
        units = [1 if form == "block" and part.is_block else len(part.layers) for part in parts]
        work = Work(progress or Silent(), 0, sum(units))
        for place, count in zip(walk(parts, images), units, strict=True):
            names = place.part.layers
            if form == "block" and place.part.is_block:
                _learn_block(place, seed, work)
                blocks, layers = blocks + 1, layers + len(names)
            else:
                layers += _learn_layers(place, seed, work)
                alone += names if form == "block" else []
            work = work._replace(done=work.done + count)
    return Reconstruction(layers, blocks, tuple(alone), len(images))


def _learn_block(place: Place, seed: int, work: Work) -> None:
    block = place.part.quantized
    layers = [block.get_submodule(name) for name in place.part.layers]
    activations = [
        (block.get_submodule(name), slot)
        for name, slot, quantizer in each_quantizer(block)
        if slot in ACTIVATION_SLOTS and isinstance(quantizer, AffineQuantizer)
    ]
    plain = None if place.plain is place.inputs else place.plain
    learn_rounding(Unit(block, layers, activations), Recorded(place.inputs, place.targets, plain), seed, work)


def _learn_layers(place: Place, seed: int, work: Work) -> int:
    """Learn the layers of a part one by one, without their activations' quantizers; return how many."""
    count = 0
    for count, (layer, _, inputs, targets) in enumerate(each_layer(place), 1):
        with with_float_activations(layer):
            unit = Unit(layer, [layer])
            learn_rounding(unit, Recorded(inputs, targets), seed, work._replace(done=work.done + count - 1))
    return count
