"""What decides on the quantizers of a layer, with a traced graph or without one."""

from collections.abc import Collection
from typing import Any, Literal

from torch import nn

from micronet import registry
from micronet.core.config import matching
from micronet.errors import MicronetError
from micronet.quantization.config import EXCLUDED, FIRST_OR_LAST, FLOAT_BITS, Bits, QuantConfig
from micronet.quantization.layers import channel_axis, has_weight_slot
from micronet.quantization.placement import Placement
from micronet.quantization.quantizer import Quantizer

FIRST_LAST_BITS = 8
Rule = Literal["float", "8bit", "8bit-input", "same"]
READS_8BIT = ("8bit", "8bit-input")
INFINITE = "it holds infinity, as masks do, which no scale covers"
INFINITE_INPUT = "its input holds infinity"


class Placer:
    """Base of the placers: it chooses each layer's rule, and makes quantizers accordingly."""

    def __init__(self, config: QuantConfig, names: Collection[str], edges: set[str], infinite: Collection[str]) -> None:
        self.placement = Placement()
        self._config = config
        self._edges = edges  # the first and the last layer
        self._infinite = infinite  # quantizers that infinity would reach
        self._chosen = (matching(config, "include", names) or set(names)) - matching(config, "exclude", names)
        self._keep_8bit = matching(config, "keep_8bit", names)
        if names and not self._chosen:
            raise MicronetError(
                "--include and --exclude leave no layers to quantize; include more layers, or exclude fewer"
            )

    def _rule(self, name: str) -> Rule:
        """Return how to quantize a layer; record the reason if it stays float."""
        if name not in self._chosen:
            self.placement.left_float[name] = EXCLUDED
            return "float"
        if name in self._keep_8bit:
            return "8bit"
        if name not in self._edges:
            return "same"
        if self._config.edge == "float":
            self.placement.left_float[name] = FIRST_OR_LAST
        return self._config.edge

    def _reads_infinity(self, name: str) -> bool:
        return f"{name}.input_quantizer" in self._infinite

    def _scheme(self, bits: Bits, *, at_least_8: bool) -> tuple[Any, Bits]:
        """Return the scheme for a bit width, and the width that the layer's rule makes of it."""
        if at_least_8:
            bits = max(bits, FIRST_LAST_BITS) if isinstance(bits, int) else FIRST_LAST_BITS
        name = "wbwtab" if isinstance(bits, str) else self._config.method
        return registry.resolve(registry.SCHEMES, name, "method"), bits

    def _quantize_weight(self, name: str, layer: Any, rule: Rule) -> None:
        if self._config.w_bits == FLOAT_BITS:
            return
        scheme, bits = self._scheme(self._config.w_bits, at_least_8=rule == "8bit")
        axis = channel_axis(layer)
        shared = self._config.q_level == "layer" and isinstance(bits, int)
        scales = (None, None) if shared else (axis, layer.weight.shape[axis])
        self.placement.put(name, "weight_quantizer", scheme.weight_quantizer(self._config, bits, *scales))

    def _activation_quantizer(self, rule: Rule, *, non_negative: bool) -> Quantizer:
        scheme, bits = self._scheme(self._config.a_bits, at_least_8=rule in READS_8BIT)
        signed = not non_negative or self._config.a_sign == "signed"
        return scheme.activation_quantizer(self._config, bits, signed=signed)  # type: ignore[no-any-return]

    def _quantize_input(self, name: str, rule: Rule) -> str:
        """Add a quantizer to a layer's input slot and return the quantizer's name."""
        self.placement.put(name, "input_quantizer", self._activation_quantizer(rule, non_negative=False))
        return f"{name}.input_quantizer"


def _has_torch_forward(layer: nn.Module) -> bool:
    """Return True if a layer's class leaves torch's forward as it is, which is what applies the quantizers."""
    return type(layer).forward.__module__.startswith(("torch.nn", "micronet."))


class LayerPlacer(Placer):
    """Places the quantizers of a network that cannot be traced: only inside its layers."""

    def __init__(self, model: nn.Module, config: QuantConfig, infinite: Collection[str]) -> None:
        layers = {name: module for name, module in model.named_modules() if has_weight_slot(module)}
        for name in [name for name, layer in layers.items() if not _has_torch_forward(layer)]:
            del layers[name]
        names = list(layers)  # without a graph, take the order of declaration
        super().__init__(config, names, {*names[:1], *names[-1:]}, infinite)
        if config.bn_fuse:
            raise MicronetError(
                "--bn-fuse needs a network that torch.fx can trace, to match batch norms to layers; drop --bn-fuse"
            )
        if config.a_bits == "binary":
            raise MicronetError(
                "--a-bits binary needs a network that torch.fx can trace, to replace ReLUs; use 2 to 16 bits"
            )
        for name, layer in layers.items():
            rule = self._rule(name)
            if rule == "float" or self._reads_infinity(name):
                self.placement.left_float.setdefault(name, INFINITE_INPUT)
                continue
            self._quantize_weight(name, layer, rule)
            self.placement.inputs[name] = None
            if config.a_bits != FLOAT_BITS:
                self.placement.inputs[name] = self._quantize_input(name, rule)
