"""Sequential MSE: the scale of each layer's weight is the one with the least error of the layer's output.

The output error with the inputs that the quantized network gives, not the weight's own, decides (NVIDIA ModelOpt and
Qualcomm AIMET call this sequential MSE; Nagel et al. 2020, arXiv:2004.10568, section 3.2, give the reason). Channels do
not affect each other, so all of them are searched at once.
"""

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress, Silent
from micronet.models.modes import eval_mode
from micronet.quantization.adaround import with_float_activations
from micronet.quantization.schemes.iao import AffineQuantizer
from micronet.quantization.walk import BATCH, LayerPlace, each_layer, parts_of, walk

CANDIDATES = 20  # fractions of the largest magnitude, 1 included
IMAGES = 256  # more say little about some twenty scales


@torch.no_grad()
def search_weight_scales(
    floating: nn.Module, quantized: nn.Module, batches: list[Tensor], progress: Progress | None = None
) -> int:
    """Choose the scale of every weight on an affine grid, in place, and freeze it; return the number of layers.

    Args:
        floating: The float network.
        quantized: The same network, quantized and calibrated.
        batches: Calibration inputs; the first ``IMAGES`` images are used.
        progress: Where to report progress.

    Raises:
        MicronetError: No layer has weights on an affine grid.
    """
    progress = progress or Silent()
    done = 0
    with eval_mode(floating, quantized):
        parts, images = parts_of(floating, quantized, batches, "--weight-calibrator seq-mse")
        total = sum(len(part.layers) for part in parts)
        for place in walk(parts, images[:IMAGES]):
            for layer_place in each_layer(place):
                _search(layer_place)
                done += 1
                progress.step("choosing the weight scales", done, total)
    return done


def _search(place: LayerPlace) -> None:
    layer = place.layer
    quantizer: AffineQuantizer = layer.weight_quantizer
    low, high = quantizer.observer.low.clone(), quantizer.observer.high.clone()
    share = torch.ones_like(low)
    least = _errors(place, quantizer)
    for step in range(1, CANDIDATES):
        candidate = torch.full_like(low, step / CANDIDATES)
        quantizer.set_range(low * candidate, high * candidate)
        errors = _errors(place, quantizer)
        share = torch.where(errors < least, candidate, share)
        least = torch.minimum(errors, least)
    quantizer.set_range(low * share, high * share)
    quantizer.freeze()


def _errors(place: LayerPlace, quantizer: AffineQuantizer) -> Tensor:
    """Return the squared error of a layer's output, for each scale: (channels,) or ()."""
    layer = place.layer
    total = torch.zeros(len(layer.weight), dtype=torch.float64, device="cpu")
    axis = -1 if isinstance(layer, nn.Linear) else 1
    with with_float_activations(layer):
        for inputs, targets in zip(*(torch.split(x, BATCH) for x in (place.inputs, place.targets)), strict=True):
            error = (layer(inputs) - targets).square().movedim(axis, 0).flatten(1).sum(1)
            total += error.cpu().double()
    return (total if quantizer.axis is not None else total.sum()).to(quantizer.scale)
