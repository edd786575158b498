"""Placing quantizers in a float network, and rebuilding that structure from a record."""

from torch import nn

from micronet.artifact.history import StageRecord
from micronet.models.modes import copy_model
from micronet.quantization.config import QuantConfig
from micronet.quantization.placement import Placement
from micronet.quantization.placer import place


def quantize_model(model: nn.Module, config: QuantConfig) -> tuple[nn.Module, StageRecord]:
    """Return a copy of a float network with quantizers placed, and the record that rebuilds it.

    The quantizers have no ranges yet: call ``calibrate``, or train inside ``observing``. The layers that stay float are
    in ``record.result["left_float"]``, a dictionary from layer name to reason.

    Raises:
        MicronetError: Nothing in the network can be quantized.
    """
    placement = place(model, config)
    quantized = placement.apply(copy_model(model))
    return quantized, StageRecord("quantize", config.to_json(), placement.to_json())


def restore(model: nn.Module, record: StageRecord) -> nn.Module:
    """Return the model with the quantizers that a record describes, uncalibrated."""
    return Placement.from_json(record.result).apply(model)
