"""What a plan will cost: the sum over its layers, and a rest that was measured on whole networks."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from micronet.compression.correction import Correction
from micronet.compression.costs import CostTable, Key
from micronet.compression.layers import Layer, Shape
from micronet.compression.onnx_layer import Form
from micronet.compression.plan import Plan
from micronet.compression.point import Quantity
from micronet.core.timing import NOISE

FLOAT_BYTES = 4
FLOATS: tuple[Form, Form] = "float", "int8 alone"  # a layer of a float network, and what may replace it
INTEGERS: tuple[Form, Form] = "float alone", "int8"


@dataclass
class Prediction:
    """Predicts the latency in milliseconds, the size in bytes or the multiply-accumulates of plans.

    latency(plan) = call + scale * sum over layers + rest * values(plan) / values(original), where the rest is
    a measured whole network's time less a call's and that of its layers: what runs between layers, and conversions next
    to float layers. If the layers take longer alone than together, as where a runtime reorders the values of each
    alone, the rest is 0 and the scale less than 1. Both are those of the network with all channels in the plan's form:
    its bits and its float layers, whose rests differ too much to predict one from another. Sizes have a rest too: what
    a file holds besides weights. What was measured so far corrects the whole; see ``Correction``.

    Attributes:
        quantity: What is predicted.
        layers: The network's layers.
        groups: The groups of channels that may be cut, in the order of a plan's widths, and their widths.
        table: The layers' measured latencies.
        fits: The scale and the rest by form; see ``fit``.
        rates: Milliseconds per multiply-accumulate of layers that are not measured, in float and in integers.
        corrections: Correct predictions by what was measured so far, for plans with the same bits and float layers.
    """

    quantity: Quantity
    layers: Mapping[str, Layer]
    groups: Mapping[int, int]
    table: CostTable | None = None
    fits: dict[tuple[bool, tuple[str, ...]], tuple[float, float]] = field(default_factory=dict)
    rates: dict[bool, float] = field(default_factory=dict)
    corrections: defaultdict[Any, Correction] = field(default_factory=lambda: defaultdict(Correction))

    def __call__(self, plan: Plan) -> float:
        """Return a plan's predicted cost, corrected by what was measured so far."""
        return self.corrections[plan.bits, plan.floats](self._sum(plan))

    def fit(self, plan: Plan, measured: float) -> None:
        """Set the rest or the scale so that the cost of a plan that cuts no channels is the measured."""
        if self.quantity == "latency":
            macs = sum(layer.calls * layer.shape.macs for layer in self.layers.values())
            known = [self.table.ms(shape, form) for shape, form in self.wanted([plan])] if self.table else []
            if all(ms is None for ms in known):
                self.rates[plan.is_float] = measured / max(1, macs)
        form = plan.is_float, plan.floats
        self.fits[form] = 1.0, 0.0
        rest = measured - self._sum(plan)
        if rest < 0 and self.quantity == "latency":
            self.fits[form] = max(0.0, measured - self._call) / (self._sum(plan) - self._call), 0.0
        else:
            self.fits[form] = 1.0, rest
        self.corrections[plan.bits, plan.floats].add(measured, measured)

    def compare(self, plan: Plan, measured: float) -> None:
        """Note a measured cost, which corrects later predictions."""
        self.corrections[plan.bits, plan.floats].add(self._sum(plan), measured)

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Measure the layers of plans that are not known yet."""
        if self.table is not None and self.quantity == "latency":
            self.table.measure(self.wanted(plans))

    def wanted(self, plans: Iterable[Plan]) -> list[Key]:
        """Return the shapes and forms of the layers of plans."""
        keys = {(shape, self._form(name, plan)): None for plan in plans for name, shape in self._shapes(plan).items()}
        return list(keys)

    def times(self, plan: Plan, *, alone: bool) -> dict[str, tuple[float | None, float | None]]:
        """Return the milliseconds of the layers that stay float, in float and in integers, if measured.

        ``alone``: in integers between float layers; see ``slower_in_integers``.
        """
        if self.table is None:
            return {}
        shapes = {name: self.layers[name].shape for name in plan.floats if name in self.layers}
        floats, integers = FLOATS if alone else INTEGERS
        return {name: (self.table.ms(shape, floats), self.table.ms(shape, integers)) for name, shape in shapes.items()}

    def _shapes(self, plan: Plan) -> dict[str, Shape]:
        shares = {
            group: new / old for (group, old), new in zip(self.groups.items(), plan.widths, strict=bool(plan.widths))
        }
        return {name: layer.narrowed(shares) for name, layer in self.layers.items()}

    def _sum(self, plan: Plan) -> float:
        shapes = self._shapes(plan)
        if self.quantity == "macs":
            return sum(self.layers[name].calls * shape.macs for name, shape in shapes.items())
        if self.quantity == "size":
            weights = sum(shape.weights * self._bytes(name, plan) for name, shape in shapes.items())
            return weights + self._fit(plan)[1]
        return self._latency(shapes, plan)

    @property
    def _call(self) -> float:
        """Milliseconds of a call, if they were measured."""
        return 0.0 if self.table is None or math.isinf(self.table.call_ms) else self.table.call_ms

    def _latency(self, shapes: Mapping[str, Shape], plan: Plan) -> float:
        """Return the milliseconds of a plan without corrections; ``shapes``: of its layers."""
        total, whole, left = 0.0, 0, 0
        for name, shape in shapes.items():
            layer = self.layers[name]
            total += layer.calls * self._ms(name, shape, self._form(name, plan))
            whole += layer.calls * layer.shape.values
            left += layer.calls * shape.values
        scale, rest = self._fit(plan)
        return self._call + scale * total + rest * left / max(1, whole)

    def _fit(self, plan: Plan) -> tuple[float, float]:
        """Return the scale and the rest of a plan's form; of one that was not measured, those of the closest."""
        forms = (plan.is_float, plan.floats), (plan.is_float, ()), (True, ())
        return next((self.fits[form] for form in forms if form in self.fits), (1.0, 0.0))

    def _bytes(self, name: str, plan: Plan) -> float:
        if self._form(name, plan) == "float":
            return FLOAT_BYTES
        bits = 8 if name in plan.wide or not isinstance(plan.bits, int) else plan.bits
        return math.ceil(bits / 4) / 2  # files store halves of a byte

    def _form(self, name: str, plan: Plan) -> Form:
        return "float" if plan.is_float or name in plan.floats else "int8"

    def _ms(self, name: str, shape: Shape, form: Form) -> float:
        """Return a layer's milliseconds; what is not measured costs in proportion to its multiply-accumulates."""
        found = self.table.ms(shape, form) if self.table is not None else None
        if found is not None:
            return found
        whole = self.layers[name].shape
        known = self.table.ms(whole, form) if self.table is not None else None
        if known is not None:
            return known * shape.macs / max(1, whole.macs)
        return self.rates.get(form == "float", self.rates.get(True, 0.0)) * shape.macs


def slower_in_integers(layers: Mapping[str, Layer], table: CostTable, *, alone: bool) -> list[str]:
    """Return the layers that are faster in float.

    ``alone``: in integers between float layers, rather than in float between integers. Either converts its values,
    which takes time.
    """
    floats, integers = FLOATS if alone else INTEGERS
    table.measure([(layer.shape, each) for layer in layers.values() for each in (floats, integers)])
    found = []
    for name, layer in layers.items():
        before, after = table.ms(layer.shape, floats), table.ms(layer.shape, integers)
        if before is not None and after is not None and after > NOISE * before:
            found.append(name)
    return found
