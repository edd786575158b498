"""The candidates whose layers are quantized, and nothing else: all of them, and with some layers left in float."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from micronet.compression.plan import Plan
from micronet.compression.point import TOLERANCE, Point
from micronet.compression.prediction import Prediction, slower_in_integers
from micronet.compression.search import Walk, spread
from micronet.compression.words import Alone, Times
from micronet.compression.workshop import Workshop
from micronet.core.machine import has_vnni
from micronet.errors import count
from micronet.evaluation.network import integer_layers
from micronet.quantization.config import FLOAT_BITS, INTEGER_BITS

EXCEPTIONS = (1, 2, 4)  # the most sensitive layers that stay float
SLOW = {"slow": False, "slow alone": True}  # layers that are slower in integers -> whether between float layers
UNSATURATED = 7  # bits of weights whose sums do not saturate on processors without VNNI
FEW = 4  # bits of weights, for files that store them so
SHARES = (1.0, 0.75, 0.5)  # of what 4 bits can save: candidates of the walk over layers
STORES_FEW = ("onnxruntime", "packed")


def try_bits(workshop: Workshop, prediction: Prediction, max_drop: float, alone: Callable[[], Alone]) -> Point:
    """Make the candidates; float layers are those that are faster so, and if int8 loses too much, the sensitive ones.

    Where sums of 8-bit weights can saturate, weights have 7 bits.

    Args:
        workshop: Where they are made; the original is made already.
        prediction: What they cost. It is fitted to all that are made: what is predicted is narrower networks.
        max_drop: The drop that is allowed, 0..1.
        alone: Measures what each layer costs if it alone is quantized.

    Returns:
        The candidate whose layers are all quantized.
    """
    int8 = workshop.confirm("int8", Plan(bits=INTEGER_BITS))
    saturates = workshop.notes.decide("sums of 8-bit weights saturate", partial(_saturates, workshop, int8))
    if saturates and workshop.attempt(f"int8, weights of {UNSATURATED} bits", Plan(bits=UNSATURATED)):
        int8 = int8 if workshop.points[-1].failed else workshop.points[-1]
    workshop.notes.decide("layers timed", lambda: prediction.prepare([Plan(), int8.plan]))
    if prediction.table is not None:
        tried = [tuple[str, ...]()]
        for kind, between_floats in SLOW.items():
            floats = _nameable(workshop.notes.decide(f"{kind} layers", partial(_slow, prediction, between_floats)))
            if len(floats) < len(prediction.layers) and floats not in tried:
                tried.append(floats)
                workshop.attempt(_name(int8, len(floats), kind), replace(int8.plan, floats=floats))
    if not int8.keeps(max_drop) and workshop.has_time("layers in integers alone", 60 * int8.minutes):
        found = alone()
        ranked = _nameable(sorted(found, key=lambda name: -found[name]["noise"]))
        for number in (each for each in EXCEPTIONS if each < len(ranked)):
            workshop.attempt(_name(int8, number, "sensitive"), replace(int8.plan, floats=ranked[:number]))
    for point in workshop.points:
        if not point.failed and point.plan.bits in (FLOAT_BITS, int8.plan.bits):
            prediction.fit(point.plan, point.value(prediction.quantity))
    return int8


def slow_times(workshop: Workshop, prediction: Prediction, plan: Plan) -> Times:
    """Return the milliseconds of a plan's float layers, in float and in integers, if they are float to be faster."""
    for kind, between_floats in SLOW.items():
        noted = workshop.notes.found.get(f"{kind} layers")
        if noted is not None and plan.floats == _nameable(noted["value"]):
            return prediction.times(plan, alone=between_floats)
    return {}


def try_few_bits(workshop: Workshop, prediction: Prediction, alone: Callable[[], Alone]) -> None:
    """Make candidates with 4 bits in as many layers as save some shares of what all of them would save.

    A walk lowers one layer at a time, always the one that saves most bytes for the noise it adds.

    Args:
        workshop: Where they are made.
        prediction: Their sizes.
        alone: Measures what each layer costs if it alone has 4 bits.
    """
    if not workshop.has_time(f"layers with {FEW} bits alone", 60 * workshop.points[-1].minutes):
        return
    found = alone()
    names = _nameable([name for name in prediction.layers if name in found])

    def lower(plan: Plan) -> Iterable[Plan]:
        return (replace(plan, wide=tuple(each for each in plan.wide if each != name)) for name in plan.wide)

    def noise(plan: Plan) -> float:
        return sum(found[name]["noise"] for name in names if name not in plan.wide)

    path = Walk(lower, prediction, noise).path(Plan(bits=FEW, wide=names))
    first, last = prediction(path[0]), prediction(path[-1])
    for plan in spread(path, prediction, [first + share * (last - first) for share in SHARES]):
        workshop.attempt(f"{FEW} bits in {len(names) - len(plan.wide)} of {count(len(names), 'layer')}", plan)


def try_learned_rounding(workshop: Workshop, base: Plan, seconds: Callable[[], float]) -> None:
    """Make quantized candidates that lose something once more, with the rounding of weights learned.

    Args:
        workshop: Where they are made; those that round to the nearest are made already.
        base: The one of 8 bits to make again; those of fewer bits all are.
        seconds: Measures how long the learning takes.
    """
    for point in list(workshop.points):
        repeats = point.plan == base or point.plan.has_few_bits
        if repeats and not point.failed and not point.plan.is_float and point.drop > TOLERANCE:
            label = f"{point.name}, learned rounding"
            learning = workshop.notes.once("seconds of learning the rounding", seconds)
            if workshop.has_time(label, 60 * point.minutes + learning):
                workshop.confirm(label, replace(point.plan, learned_rounding=True))


def _slow(prediction: Prediction, between_floats: bool) -> list[str]:
    assert prediction.table is not None
    return slower_in_integers(prediction.layers, prediction.table, alone=between_floats)


def _saturates(workshop: Workshop, int8: Point) -> bool:
    """Whether sums of products with 8-bit weights can saturate where candidates run; int8 may have failed for that."""
    if workshop.deployment.runtime != "openvino" or has_vnni():
        return False
    return bool(int8.failed) or "saturating" in (integer_layers(workshop.open(int8.plan)) or {})


def _name(int8: Point, number: int, kind: str) -> str:
    return f"{int8.name}, {number} {kind} float"


def _nameable(layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that a setting can list: those without a comma in their names."""
    return tuple(name for name in layers if "," not in name)
