"""Where quantizers go in a network, as data: the result in a record of the quantize stage, and what rebuilds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from micronet.graph.rewrite import Branch, Outline, rewrite
from micronet.graph.trace import plain_network
from micronet.models import transformer
from micronet.models.layers import removed
from micronet.quantization.layers import give_bias, quantized, replace_modules
from micronet.quantization.quantizer import Quantizer, rebuild


@dataclass
class Placement:
    """Where quantizers go. Modules and graph nodes are given by name."""

    attention: list[str] = field(default_factory=list)  # attentions of torch, which are first split into layers
    plain: bool = False  # whether layers that are not torch's modules are then made so (see ``graph.plain``)
    recorded: list[dict[str, Any]] | None = None  # inputs to record the forward on, if torch.fx cannot trace it
    fixed_sizes: bool = False  # whether the record is wrong for inputs of other sizes, which the network took before
    taps: list[str] = field(default_factory=list)  # nodes followed by a new ``Tap``, which holds an output quantizer
    splits: list[Branch] = field(default_factory=list)  # branches to some readers of a node, each with a ``Tap``
    dropped: list[str] = field(default_factory=list)  # ReLUs that a sign replaces
    fused: list[list[str]] = field(default_factory=list)  # (convolution, batch norm that it folds while training)
    out_of_place: list[str] = field(default_factory=list)  # in-place ReLUs whose output quantizer clamps instead
    quantizers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # module -> slot -> description
    inputs: dict[str, str | None] = field(default_factory=dict)  # layer -> its input's quantizer, ``module.slot``
    biases: list[str] = field(default_factory=list)  # layers without a bias that were given one, to be corrected
    left_float: dict[str, str] = field(default_factory=dict)  # layer or call with weights -> why it stays float

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        """Make a placement from its JSON object. Raises TypeError for any other JSON object."""
        return cls(**{**value, "splits": [Branch(**split) for split in value.get("splits", [])]})

    def put(self, module: str, slot: str, quantizer: Quantizer) -> None:
        """Add a quantizer to a slot."""
        self.quantizers.setdefault(module, {})[slot] = quantizer.describe()

    def remove(self, idle: Mapping[str, str]) -> None:
        """Remove quantizers, ``module.slot`` -> reason; a layer whose weight or own input had one stays float."""
        for name, reason in idle.items():
            module, _, slot = name.rpartition(".")
            self.quantizers[module].pop(slot, None)
            if module in self.inputs and slot != "output_quantizer":
                del self.inputs[module]
                self.left_float[module] = reason
                for other in ("weight_quantizer", "input_quantizer"):
                    self.quantizers[module].pop(other, None)
        self.fused = [pair for pair in self.fused if pair[0] in self.inputs]
        gone = {name for name in idle if name.endswith(".output_quantizer")}
        self.inputs = {layer: None if source in gone else source for layer, source in self.inputs.items()}
        self.quantizers = {module: slots for module, slots in self.quantizers.items() if slots}

    def with_plain_layers(self, model: nn.Module) -> nn.Module:
        """Return the float network with the layers that get quantizers as modules; it shares all tensors."""
        model = transformer.split_layers(model, self.attention)
        return plain_network(model, self.recorded) if self.plain or self.recorded else model

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the network with taps and quantizers; it shares all tensors with ``model``, which it replaces."""
        model = self.with_plain_layers(model)
        if self.taps or self.splits:
            model = rewrite(model, Outline(self.taps, self.splits))
        for name in self.out_of_place:
            model.get_submodule(name).inplace = False  # type: ignore[assignment]  # mypy knows tensors and modules
        new: dict[nn.Module, Any] = {}
        for name in self.dropped:
            new[model.get_submodule(name)] = nn.Identity()
        for name, norm_name in self.fused:
            layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
            new[layer], new[norm] = quantized(layer), removed(norm)
            new[layer].norm = norm
        for name, slots in self.quantizers.items():
            module = model.get_submodule(name)
            new[module] = quantized(new.get(module, module))
            like = next(each for each in chain(module.parameters(), model.parameters()) if not each.is_complex())
            for slot, description in slots.items():
                if (description.get("channels") or 0) > like.numel():
                    raise ValueError(f"{name}.{slot} has {description['channels']} channels for {like.numel()} values")
                setattr(new[module], slot, rebuild(description, like))
        for name in self.biases:
            give_bias(new[model.get_submodule(name)])
        return replace_modules(model, new)
