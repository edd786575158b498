"""Where quantizers go in a network, as data: what a record of the quantize stage holds and what rebuilds it."""

from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from micronet.graph.rewrite import Branch, Outline, rewrite
from micronet.models import transformer
from micronet.quantization.layers import quantized, replace_modules
from micronet.quantization.quantizer import Quantizer, rebuild


@dataclass
class Placement:
    """Where quantizers go.

    ``attention``: torch's attentions that get layers of their own first, which can be quantized. ``taps``: graph nodes
    behind which a named place is added. ``splits``: places on the way to some readers alone. ``fused``: (convolution,
    batch norm) that the convolution folds while training. ``dropped``: ReLUs that a sign takes the place of.
    ``out_of_place``: ReLUs in place whose input nothing else reads and whose output's grid begins at 0: it does their
    work, and their input stays. ``quantizers``: module -> slot -> description.
    ``inputs``: quantized layer -> the quantizer (``module.slot``) its input comes through, or None.
    ``left_float``: layers with weights that stay float, and why.
    """

    attention: list[str] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)
    splits: list[Branch] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fused: list[list[str]] = field(default_factory=list)
    out_of_place: list[str] = field(default_factory=list)
    quantizers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    inputs: dict[str, str | None] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        """Build a placement from its JSON object. Raises TypeError where it is not one."""
        return cls(**{**value, "splits": [Branch(**split) for split in value.get("splits", [])]})

    def to_json(self) -> dict[str, Any]:
        """Return the placement as a JSON object."""
        return asdict(self)

    def put(self, module: str, slot: str, quantizer: Quantizer) -> None:
        """Note that a quantizer goes into a slot."""
        self.quantizers.setdefault(module, {})[slot] = quantizer.describe()

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the network with taps and quantizers.

        It shares the model's parameters and buffers; do not use ``model`` itself afterwards.
        """
        model = transformer.split_attentions(model, self.attention)
        if self.taps or self.splits:
            model = rewrite(model, Outline(self.taps, self.splits))
        for name in self.out_of_place:
            model.get_submodule(name).inplace = False  # type: ignore[assignment]  # mypy knows tensors and modules
        new: dict[nn.Module, Any] = {}
        for name in self.dropped:
            new[model.get_submodule(name)] = nn.Identity()
        for name, norm_name in self.fused:
            layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
            new[layer], new[norm] = quantized(layer), nn.Identity()
            new[layer].norm = norm
        for name, slots in self.quantizers.items():
            module = model.get_submodule(name)
            new[module] = quantized(new.get(module, module))
            like = next(chain(module.parameters(), model.parameters()))
            for slot, description in slots.items():
                setattr(new[module], slot, rebuild(description, like))
        return replace_modules(model, new)
