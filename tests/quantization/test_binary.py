"""Binary weights: what their levels are the signs of."""

import torch

from micronet.quantization.config import QuantConfig
from micronet.quantization.quantizer import rebuild
from micronet.quantization.schemes.wbwtab import weight_quantizer

WEIGHT = torch.randn(5, 4, 3, 3)
CENTERED = WEIGHT - WEIGHT.mean(1, keepdim=True)


def binary(**config):
    return weight_quantizer(QuantConfig(w_bits="binary", **config), "binary", 0, 5)


def test_levels_are_the_signs_of_the_weight_or_of_the_centered_weight():
    for quantizer, signed in ((binary(), WEIGHT), (binary(w_center=True), CENTERED)):
        assert torch.equal(quantizer.integers(WEIGHT), torch.where(signed >= 0, 1.0, -1.0))
        assert torch.equal(quantizer.qparams(WEIGHT).scale, signed.abs().flatten(1).mean(1))


def test_a_file_that_does_not_say_whether_weights_are_centered_has_centered_ones():
    for described in (binary().describe(), binary(w_center=True).describe()):
        assert rebuild(described, WEIGHT).describe() == described
        del described["centered"]
        assert torch.equal(rebuild(described, WEIGHT).integers(WEIGHT), torch.where(CENTERED >= 0, 1.0, -1.0))
