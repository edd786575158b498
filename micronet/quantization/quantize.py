"""The ``quantize`` stage: a float network becomes the same network with quantizers in it."""

import copy

from torch import nn

from micronet.artifact.history import StageRecord
from micronet.quantization.config import QuantConfig
from micronet.quantization.placement import Placement
from micronet.quantization.placer import place


def quantize_model(model: nn.Module, config: QuantConfig) -> tuple[nn.Module, StageRecord]:
    """Return a copy of a float network with quantizers placed, and the record that rebuilds it.

    The quantizers have no ranges yet: calibrate, or train inside ``observing``.
    Raises MicronetError where nothing can be quantized.
    """
    placement = place(model, config)
    quantized = placement.apply(copy.deepcopy(model))
    return quantized, StageRecord("quantize", config.to_json(), placement.to_json())


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Rebuild the structure that a record describes."""
    return Placement.from_json(record.result).apply(model)
