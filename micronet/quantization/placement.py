"""Which tensors of a network get a quantizer, and where it sits.

One quantizer a tensor: the tensor is named by its origin, the node of the traced graph whose values it holds, and the
quantizer sits in that module's output slot, so every reader sees the same numbers. Quantized are the inputs of every
convolution and linear layer, of every average pool, and of every add or concatenation between layers (a runtime
computes an add in integers only where both of its inputs are on grids). A network that cannot be traced gets input
quantizers in its layers alone.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from micronet import registry
from micronet.errors import MicronetError
from micronet.graph import Graph, add_taps, tap_name, trace
from micronet.quantization.config import FLOAT_BITS, QuantConfig
from micronet.quantization.layers import attach, has_weight_slot
from micronet.quantization.quantizer import Quantizer, rebuild


@dataclass
class Placement:
    """Where quantizers go.

    ``taps``: graph nodes behind which a named place is added. ``quantizers``: module -> slot -> description.
    ``inputs``: quantized layer -> the quantizer (``module.slot``) its input comes through, or None.
    ``left_float``: layers with weights that stay float, and why.
    """

    taps: list[str] = field(default_factory=list)
    quantizers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[str, str | None] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    def put(self, module: str, slot: str, quantizer: Quantizer) -> None:
        """Note that a quantizer goes into a slot."""
        self.quantizers.setdefault(module, {})[slot] = quantizer.describe()

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the network with its taps and quantizers; modules are swapped in place."""
        if self.taps:
            model = add_taps(model, self.taps)
        for name, described in self.quantizers.items():
            for slot, description in described.items():
                attach(model.get_submodule(name), slot, rebuild(description))
        return model


def place(model: nn.Module, config: QuantConfig) -> Placement:
    """Decide on every quantizer of a float network. Raises MicronetError where there is nothing to quantize."""
    graph = trace(model)
    placement = (_LayerPlacer(model, config) if graph is None else _GraphPlacer(graph, config)).placement
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            placement.left_float[name] = "MultiheadAttention multiplies its packed weights itself"
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and name not in placement.inputs:
            if has_weight_slot(module):
                placement.left_float[name] = "it is never called as a module of its own"
            else:
                placement.left_float[name] = f"{type(module).__name__} is not quantized yet"
    if not placement.inputs:
        raise MicronetError("the network has no convolution or linear layer that could be quantized")
    return placement


class _Placer:
    """Puts quantizers where it is told, at the bits the scheme gives that place."""

    def __init__(self, config: QuantConfig) -> None:
        self.placement = Placement()
        self._config = config
        self._scheme = registry.resolve(registry.SCHEMES, config.method, "method")

    def _activation_bits(self, *, at_edge: bool) -> int:
        bits: int = self._scheme.layer_bits(self._config.a_bits, self._config, at_edge=at_edge)
        return bits

    def _quantize_weight(self, name: str, layer: Any, *, at_edge: bool) -> None:
        if self._config.w_bits != FLOAT_BITS:
            bits = self._scheme.layer_bits(self._config.w_bits, self._config, at_edge=at_edge)
            quantizer = self._scheme.weight_quantizer(self._config, bits, 0, layer.weight.shape[0])
            self.placement.put(name, "weight_quantizer", quantizer)

    def _quantize_input(self, name: str, bits: int) -> str:
        """Give a layer a quantizer of its own input, and return the quantizer's name."""
        quantizer = self._scheme.activation_quantizer(self._config, bits, non_negative=False)
        self.placement.put(name, "input_quantizer", quantizer)
        return f"{name}.input_quantizer"


class _GraphPlacer(_Placer):
    """Places the quantizers of a traced network."""

    def __init__(self, graph: Graph, config: QuantConfig) -> None:
        super().__init__(config)
        self._graph = graph
        self._layers = {node: module for node, module in graph.calls() if has_weight_slot(module)}
        self._quantizer_of: dict[fx.Node, str] = {}
        for node, module in self._layers.items():
            self._place_layer(node, module)
        if config.a_bits != FLOAT_BITS:
            self._place_reads()

    def _place_layer(self, node: fx.Node, layer: nn.Module) -> None:
        name = str(node.target)
        source = self._graph.origin(self._graph.inputs(node)[0])
        at_edge = source.op == "placeholder" or not self._has_layer_behind(node)
        self._quantize_weight(name, layer, at_edge=at_edge)
        if self._config.a_bits == FLOAT_BITS:
            self.placement.inputs[name] = None
            return
        bits = self._activation_bits(at_edge=at_edge)
        if self._graph.call_count(layer) > 1:  # its inputs have scales of their own, so its bias has no one unit
            self._quantize_output(source, bits)
            self.placement.inputs[name] = None
        elif source.op == "placeholder":
            self.placement.inputs[name] = self._quantize_input(name, bits)
        else:
            self.placement.inputs[name] = self._quantize_output(source, bits)

    def _place_reads(self) -> None:
        """Quantize what average pools read, and what adds and concatenations between layers read.

        A runtime keeps the layer before in integers only where the layer's output is on a grid too.
        """
        for node in self._graph.fx.nodes:
            last = not self._has_layer_behind(node)
            if self._graph.averages(node) or (self._graph.joins(node) and not last):
                bits = self._activation_bits(at_edge=last)
                for source in map(self._graph.origin, self._graph.inputs(node)):
                    if source.op != "placeholder":
                        self._quantize_output(source, bits)

    def _quantize_output(self, source: fx.Node, bits: int) -> str:
        """Give a node's output a quantizer, once, and return the quantizer's name."""
        if source not in self._quantizer_of:
            module = self._graph.module(source)
            if module is None or self._graph.call_count(module) > 1:
                self.placement.taps.append(source.name)
                place = tap_name(source.name)
            else:
                place = str(source.target)
            quantizer = self._scheme.activation_quantizer(
                self._config, bits, non_negative=self._graph.non_negative(source)
            )
            self.placement.put(place, "output_quantizer", quantizer)
            self._quantizer_of[source] = f"{place}.output_quantizer"
        return self._quantizer_of[source]

    def _has_layer_behind(self, node: fx.Node) -> bool:
        return bool(self._graph.reachable(node) & self._layers.keys())


class _LayerPlacer(_Placer):
    """Places the quantizers of a network that cannot be traced: inside its layers alone."""

    def __init__(self, model: nn.Module, config: QuantConfig) -> None:
        super().__init__(config)
        layers = {name: module for name, module in model.named_modules() if has_weight_slot(module)}
        for index, (name, layer) in enumerate(layers.items()):
            at_edge = index in (0, len(layers) - 1)  # declared order is all there is to go by
            self._quantize_weight(name, layer, at_edge=at_edge)
            self.placement.inputs[name] = None
            if config.a_bits != FLOAT_BITS:
                self.placement.inputs[name] = self._quantize_input(name, self._activation_bits(at_edge=at_edge))
