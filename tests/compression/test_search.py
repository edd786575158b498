"""The parts of a search: the walk, what is asked for, and what is said of it."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from micronet.compression.bits import slow_times, try_bits
from micronet.compression.correction import Correction
from micronet.compression.costs import Deployment
from micronet.compression.goal import Goal
from micronet.compression.groups import Groups
from micronet.compression.judge import _of_parts, error_of_drop, quality_of_part
from micronet.compression.layers import find_layers
from micronet.compression.narrowing import BETWEEN, NEAR, REHEARSED, Narrowing
from micronet.compression.plan import CRITERION, Basis, Plan
from micronet.compression.point import Point, front, spell_drop
from micronet.compression.prediction import Prediction
from micronet.compression.result import draw
from micronet.compression.search import Walk, ladder, narrower, spread
from micronet.compression.words import (
    describe_chance,
    describe_choice,
    describe_errors,
    describe_floats,
    describe_int8,
    describe_limit,
    describe_losses,
    describe_test,
    describe_threads,
    describe_unsure,
    resolution_of,
    table,
)
from micronet.compression.workshop import _is_the_plans
from micronet.evaluation import plot
from micronet.evaluation.cost import count_macs
from micronet.models.nin import nin
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model
from micronet.tasks.segmentation import Segmentation


def test_the_walk_is_optimal_where_savings_fall_and_losses_rise():
    """If each further cut of a group saves no more and loses no less than the one before, greedy plans are optimal."""
    random = np.random.default_rng(3)
    groups = dict.fromkeys(range(3), 5)
    saved = -np.sort(-random.integers(1, 50, (3, 4)), axis=1)
    lost = np.sort(random.integers(1, 50, (3, 4)), axis=1)

    def total(steps, plan):
        return sum(int(row[: 5 - width].sum()) for row, width in zip(steps, plan.widths, strict=True))

    walk = Walk(
        narrower(groups, dict.fromkeys(groups, 1)),
        lambda plan: 1000 - total(saved, plan),
        lambda plan: total(lost, plan),
    )
    path = walk.path(Plan(widths=(5, 5, 5)))
    every = [Plan(widths=widths) for widths in product(ladder(5, 1), repeat=3)]
    for plan in path:
        best = min(walk.noise(other) for other in every if walk.cost(other) <= walk.cost(plan))
        assert walk.noise(plan) == best
    assert path[-1].widths == (1, 1, 1)  # a quarter of the channels, rounded: the narrowest
    assert spread(path, walk.cost, [0.0, 0.0]) == [path[-1]]


def test_the_walk_goes_around_what_the_network_cannot_have():
    groups = {0: 4, 1: 4}
    walk = Walk(
        narrower(groups, dict.fromkeys(groups, 1)), lambda plan: sum(plan.widths), lambda plan: -plan.widths[0],
        allowed=lambda plan: plan.widths[1] == 4,
    )  # fmt: skip
    assert [plan.widths for plan in walk.path(Plan(widths=(4, 4)))] == [(4, 4), (3, 4), (2, 4), (1, 4)]


def test_the_walk_jumps_where_the_next_width_saves_nothing():
    cost = {8: 10, 7: 10, 6: 11, 5: 4, 4: 4, 3: 4, 2: 4}
    near, far = (narrower({0: 8}, {0: 1}, far=far) for far in (False, True))
    walk = Walk(near, lambda plan: cost[plan.widths[0]], lambda plan: -plan.widths[0], jumps=far)
    assert [plan.widths for plan in walk.path(Plan(widths=(8,)))] == [(8,), (5,)]


@pytest.mark.parametrize("widest", [3, 8, 48, 64, 100])
@pytest.mark.parametrize("multiple", [1, 8])
def test_widths_of_a_ladder_are_multiples_down_to_a_quarter(widest, multiple):
    widths = ladder(widest, multiple)
    assert widths[0] == widest
    assert widths == sorted(set(widths), reverse=True)
    assert all(width % multiple == 0 for width in widths[1:])
    assert all(width >= multiple and width >= round(widest / 4) for width in widths[1:])


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.depth, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1)
        self.up, self.head = nn.ConvTranspose2d(12, 6, 2, stride=2), nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = self.up(self.last(self.depth(self.first(x)).relu()).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("network", [lambda: nin(width=0.1), Depthwise], ids=["nin", "depthwise"])
def test_predicted_macs_are_those_of_the_pruned_network(network):
    """The shapes of narrower layers are computed from widths alone, and must be those of the real cut."""
    model, example = network().eval(), torch.rand(1, 3, 16, 16)
    groups = Groups.find(model, example)
    predict = Prediction("macs", find_layers(model, example, groups.channels), groups.widths)
    assert predict(Plan()) == count_macs(model, example)
    plans = [Plan(widths=groups.uniform(0.5)), next(iter(narrower(groups.widths, groups.multiples)(Plan())))]
    for plan in plans:
        widths = ",".join(map(str, plan.widths))
        config = PruneConfig(criterion=CRITERION, regular=groups.multiple, widths=widths)
        pruned, _, _ = prune_model(model, config, example)
        assert predict(plan) == count_macs(pruned, example)


def point(name, drop, size, **more):
    return Point(name, Plan(), drop=drop, size_bytes=size, **more)


POINTS = [point("float", 0.0, 100), point("int8", 0.005, 30), point("half", 0.02, 15), point("bad", 0.5, 40)]


@pytest.mark.parametrize(
    ("max_drop", "target", "chosen", "says"),
    [
        (0.01, None, "int8", ""), (0.03, None, "half", ""), (0.0, None, "float", ""), (0.03, 0.5, "int8", ""),
        (0.03, 1.0, "float", ""), (0.01, 0.2, "int8", "half meets it with a drop of 2.00 points"),
        (0.01, 0.1, "int8", "; the smallest candidate of all is half, with 0.15 and a drop of 2.00 points; raise"),
        (0.6, 0.1, "half", "within --max-drop 60 is half, with 0.15 of the original's size; raise --target-size, or"),
    ],
)  # fmt: skip
def test_the_choice_is_the_least_within_the_drop(max_drop, target, chosen, says):
    choice = Goal("size", max_drop, target).choose([*POINTS, point("none", 0.0, 0, failed="no such operator")])
    assert choice.point.name == chosen
    assert says in choice.miss
    assert bool(says) == bool(choice.miss)


def test_a_missed_target_is_named_by_what_it_is_about():
    points = [replace(each, latency_ms=each.size_bytes, macs=each.size_bytes) for each in POINTS]
    said = {quantity: Goal(quantity, 0.01, 0.1).choose(points).miss for quantity in ("latency", "macs")}
    assert "the fastest candidate within --max-drop 1 is int8, with 0.3 of the original's latency" in said["latency"]
    assert "the candidate with the fewest multiply-accumulates of all is half" in said["macs"]
    alike = [points[0], replace(points[1], latency_ms=101, drop=-0.1)]  # as fast within the noise of timing
    assert Goal("latency", 0.01, 0.1).choose(alike).point is alike[1]
    assert "--max-drop 1 is float, with 1 of" in Goal("latency", 0.01, 0.1).choose(alike).miss
    unsure = [*points[:2], replace(points[2], drop_error=0.00123)]
    assert Goal("size", 0.01, 0.2).choose(unsure).miss.endswith("2.00 ± 0.12 points: raise --max-drop to 2.13")


def test_no_error_is_shown_below_that_of_one_sample():
    """Samples that are alike in two networks do not say that none would differ; the choice is not changed by it."""
    assert (resolution_of(144, "accuracy"), resolution_of(144, "mean_iou")) == (1 / 144, 0)
    same = Point("int8", Plan(), drop_error=0.0, resolution=1 / 144, size_bytes=1)
    assert spell_drop(same) == "0.00 ± 0.69 points"
    assert spell_drop(replace(same, drop_error=0.02)) == "0.00 ± 2.00 points"
    assert spell_drop(replace(same, drop_error=None)) == "0.00 points"
    original = {**Point("float", Plan(), size_bytes=2).to_json(), "front": False}
    assert table([original, {**same.to_json(), "front": True}], "int8")[2][1] == "+0.00 ± 0.69 pt"
    assert Goal("size", 0.0).choose([Point("float", Plan(), size_bytes=2), same]).point is same


def test_a_limit_matters_to_what_was_trained_here():
    assert describe_limit(100, None, ["import"]) == describe_limit(100, 100, ["train"]) == []
    assert describe_limit(100, None, ["import", "finetune"])[0].startswith("warning: --limit is not that of the train")


def test_a_drop_as_large_as_the_one_allowed_is_kept():
    assert all(Point("x", Plan(), drop=(n - 50) / n - (n - 100) / n).keeps(50 / n) for n in range(5000, 5100))
    assert not Point("x", Plan(), drop=0.0101).keeps(0.01)
    assert not Point("x", Plan(), failed="no such operator").keeps(0.01)


def test_the_front_has_what_nothing_beats():
    assert [each.name for each in front(POINTS, "size")] == ["float", "int8", "half"]


def test_multiply_accumulates_that_cannot_be_counted_are_no_gain(monkeypatch):
    points = [
        Point("float", Plan(), macs=100),
        Point("half", Plan(), macs=50, drop=0.1),
        Point("odd", Plan(), macs=None),
    ]
    assert [each.name for each in front(points, "macs")] == ["float", "half"]
    axes = Mock()
    monkeypatch.setattr(plot, "draw", lambda _path, _size, fill: fill(axes))
    draw([*points, Point("best", Plan(), macs=None, drop=-0.1)], points[1], "macs", Path("front.svg"))
    assert list(map(list, axes.scatter.call_args_list[0].args)) == [[100, 50], [0, 10]]
    assert list(map(list, axes.step.call_args.args)) == [[100, 50], [0, 10]]


def test_a_gpu_without_memory_fails_one_candidate():
    assert _is_the_plans(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert not _is_the_plans(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_drop_counts_with_its_standard_error_and_the_words_say_what_that_costs():
    """Two networks that differ on the same few samples: by chance, one of them loses nothing on these."""
    points = [point("float", 0.0, 100), point("int8", 0.0, 30, drop_error=0.004), point("half", 0.004, 15)]
    points[2] = Point("half", Plan(bits=8), drop=0.004, drop_error=0.011, size_bytes=15)
    goal = Goal("size", 0.01)
    assert goal.choose(points).point.name == "int8"
    [line] = describe_unsure(points, goal)
    assert "half has 0.15 of the size and a drop of 0.40 ± 1.10 points" in line and "--max-drop 1.5" in line
    assert goal.choose([*points[:2], replace(points[2], drop_error=None)]).point.name == "half"
    assert describe_unsure(points, Goal("size", 0.015)) == []


def test_the_error_of_a_drop_is_that_of_paired_samples():
    """Of n samples that are right or wrong, McNemar's: sqrt(b + c - (b - c)^2 / n) / (n - 1), alike in both or not."""
    random = np.random.default_rng(0)
    before, after = (random.random((2, 400)) < 0.7).astype(float)
    lost, won = ((before > after).sum(), (before < after).sum())
    expected = np.sqrt((lost + won - (lost - won) ** 2 / 400) / (400 * 399))
    assert error_of_drop(list(before), list(after)) == pytest.approx(expected)
    assert error_of_drop([0.9, 0.5, None], [0.8, 0.4, 0.3]) == pytest.approx(0.0, abs=1e-12)
    assert error_of_drop([0.9], [0.8]) is None


def test_the_error_of_a_mean_iou_is_not_that_of_single_images():
    """An image without a class does not lose a third by three wrong pixels: the jackknife looks at all images."""
    whole, *parts = (Segmentation().meter() for _ in range(7))
    for number, part in enumerate(parts):
        labels = torch.zeros(1, 8, 8, dtype=torch.int64)
        labels[0, 4:] = 1 + number % 2
        found = labels.clone()
        found[0, 0, : number % 3] = 1 + (number + 1) % 2
        for meter in (whole, part):
            meter.add(found, labels, 3)
    alone = [1 - part.compute()["mean_iou"] for part in parts]
    values = [each["mean_iou"] for each in _of_parts(whole, *parts)]
    assert error_of_drop([1.0] * 6, values) < 0.2 * error_of_drop(alone, [0.0] * 6)
    accuracies = [each["pixel_accuracy"] for each in _of_parts(whole, *parts)]  # a mean over equal parts
    assert accuracies == pytest.approx([part.compute()["pixel_accuracy"] for part in parts])


def test_a_part_without_the_metric_does_not_count():
    judge = SimpleNamespace(metric="auc", task=Segmentation())
    assert quality_of_part(judge, {"accuracy": 0.5}) is None
    assert quality_of_part(judge, {"auc": 0.7}) == 0.7
    judge.metric = None
    assert quality_of_part(judge, {}) is None


def test_sizes_that_are_nearly_equal_leave_the_choice_to_the_drop():
    points = [point("float", 0.0, 1000), point("short", 0.009, 500), point("long", 0.001, 508)]
    assert Goal("size", 0.01).choose(points).point.name == "long"


def test_an_original_that_is_no_better_than_chance_is_said():
    assert "test accuracy is 55.0% for 2 classes, as by chance" in describe_chance(0.55, 2, 100, "test")[0]
    assert describe_chance(0.65, 2, 100, "test") == describe_chance(None, 2, 100, "test") == []


def test_more_threads_than_cores_are_said():
    assert "--threads 4096 is more than the" in describe_threads(4096)[0]
    assert describe_threads(1) == []


def test_words_name_what_stays_float_and_what_gets_worse():
    assert describe_floats({"up": "no int8", "head": "no int8", "stem": "slow"}, ["stem"]) == [
        "in float: up, head (no int8)"
    ]
    original, slow = (Point("", Plan(), latency_ms=ms, size_bytes=size) for ms, size in ((1.0, 100), (1.2, 60)))
    assert describe_losses(slow, original) == ["warning: slower than the original: 1.20 of its latency"]
    assert describe_losses(original, original) == []
    assert "1.20 of the latency and 0.60 of the size" in describe_int8(slow, original)
    assert describe_int8(replace(slow, failed="no"), original) == "weights stay float: int8 cannot be made (no)"


@pytest.mark.parametrize("limit", [0, 3, 10, 20])
def test_the_walk_is_bisected_for_the_narrowest_plan_that_keeps_the_drop(limit):
    """The drop grows along the walk; its ends are known, and each further plan is made as soon as it is named."""
    path = [Plan(widths=(32 - index,), bits=8) for index in range(16)]

    def measured(plan):
        return Point("", plan, drop=0.0 if plan.widths[0] >= 32 - limit else 0.1)

    workshop = SimpleNamespace(points=[measured(path[0]), measured(path[-1])])
    narrowing = Narrowing(
        workshop, lambda plan: plan.widths[0], Groups({0: 32}, {0: 1}), Goal("latency", 0.01), path=path
    )
    while (found := narrowing.between()) is not None:
        workshop.points.append(measured(found[1]))
    narrowest = min(point.plan.widths[0] for point in workshop.points if point.keeps(0.01))
    assert narrowest <= max(32 - limit, path[-1].widths[0]) / NEAR
    assert len(workshop.points) <= 2 + BETWEEN


class _Corrected:
    """Predicts the width, corrected; see ``Prediction``."""

    def __init__(self):
        self.correction = Correction()

    def __call__(self, plan):
        return self.correction(plan.widths[0])

    def compare(self, plan, measured):
        self.correction.add(plan.widths[0], measured)

    def prepare(self, plans):
        pass


def test_plans_of_the_walk_are_made_first_where_they_show_most(monkeypatch):
    """The walk's first step leaves widths that the runtime is slow at: every plan but the original takes longer."""
    path = [Plan(widths=(64 - index,), bits=8) for index in range(48)]
    prediction, points = _Corrected(), [Point("", path[0], latency_ms=64.0)]
    prediction.compare(path[0], 64.0)

    def measured(plan):
        return plan.widths[0] * (1.0 if plan == path[0] else 1.25 - 0.1 * plan.widths[0] / 64)

    def attempt(name, plan):
        points.append(Point(name, plan, latency_ms=measured(plan)))
        return True

    notes = SimpleNamespace(decide=lambda _, find: find())
    workshop = SimpleNamespace(points=points, attempt=attempt, notes=notes)
    groups = Groups({0: 64}, {0: 1})
    narrowing = Narrowing(workshop, prediction, groups, Goal("latency", 0.01))
    monkeypatch.setattr(narrowing, "_path", lambda *_: path)
    monkeypatch.setattr("micronet.compression.narrowing.UNIFORM", ())
    narrowing.plans(path[0], {})
    widths = [point.plan.widths[0] for point in points[1:]]
    assert widths[0] == 17
    assert all(17 < width < 64 for width in widths[1:])
    assert len(widths) == REHEARSED
    errors = [abs(prediction(plan) / measured(plan) - 1) for plan in path if plan.widths[0] <= max(widths)]
    assert max(errors) < 0.02


def test_7_bits_are_tried_where_8_saturate_so_much_that_they_cannot_be_made(monkeypatch):
    monkeypatch.setattr("micronet.compression.bits.has_vnni", lambda: False)
    points = [Point("float", Plan())]

    def make(name, plan, failed=""):
        points.append(Point(name, plan, failed=failed))
        return points[-1]

    workshop = SimpleNamespace(
        points=points, confirm=lambda *words: make(*words, failed="the outputs differ"), attempt=make,
        notes=SimpleNamespace(decide=lambda _, find: find()), deployment=Deployment("openvino"),
    )  # fmt: skip
    prediction = SimpleNamespace(table=None, quantity="size", prepare=list, fit=lambda *_: None)
    assert try_bits(workshop, prediction, 0.01, dict).plan == Plan(bits=7)


def test_words_say_what_was_given_up_where():
    plan = Plan((16, 8), bits=4, floats=("conv1",), wide=("conv4",), epochs=(2,))
    alone = {8: {"conv1": {"noise": 1.0, "drop": 0.009}}, 4: {"conv4": {"noise": 1.0, "drop": 0.021}}}
    lines = describe_choice(Point("x", plan), [("conv2", 16), ("conv3", 32)], alone, {})
    assert lines == [
        "1 of 2 groups of channels is narrower: conv3 32 -> 8; whole: conv2",
        "weights have 4 bits, calibrated (PTQ)",
        "conv1 stays float: in integers alone it costs 0.90 points",
        "conv4 keeps 8 bits: alone it costs 2.10 points at 4",
    ]
    costs = {8: {"a": {"noise": 1.0, "drop": 0.0}}}
    lines = describe_choice(Point("x", Plan(bits=8, floats=tuple("abcde"))), [], costs, {"a": (0.046, 0.066)})
    assert lines[1] == "a stays float: alone it takes 0.066 ms in integers, 0.046 ms in float"
    assert lines[-1] == "1 more layer stays float"
    assert "nothing was given up" in describe_choice(Point("float", Plan()), [], {}, {})[0]


def test_slow_layers_are_told_from_sensitive_ones():
    notes = SimpleNamespace(found={"slow layers": {"value": ["b"]}, "slow alone layers": {"value": ["a", "b"]}})
    prediction = SimpleNamespace(times=lambda plan, alone: dict.fromkeys(plan.floats, alone))
    found = [
        slow_times(SimpleNamespace(notes=notes), prediction, Plan(floats=tuple(each))) for each in ("ab", "b", "a")
    ]
    assert found == [{"a": True, "b": True}, {"b": False}, {}]


def test_norms_are_folded_only_where_some_can_be():
    for folds in (True, False):
        basis = Basis(Path("a.safetensors"), {}, {}, "onnxruntime", folds_norms=folds)
        made = [each["command"] for each in basis.entries(Plan(bits=8))]
        assert made == ["quantize", *["bn-fuse"] * folds, "export-onnx"]


def test_only_unknown_latencies_count_as_predicted():
    """Trained longer, a candidate has the latency that was measured before, and the prediction knows it."""

    def timed(epochs, predicted, measured, width=8):
        return Point("", Plan((width,), 8, epochs=epochs), latency_ms=measured, predicted_ms=predicted)

    points = [
        timed((), None, 1.0, width=16),
        timed((), 0.9, 1.0),
        timed((1,), 1.0, 1.0),
        timed((1,), 1.0, 1.0, width=16),
    ]
    assert describe_errors(points) == "error of the predicted latencies: 10.0% (median of 1 candidate), 10.0% at most"


def test_a_drop_on_test_data_as_large_as_the_one_allowed_gets_no_warning():
    assert describe_test(0.99 - 0.98, 0.01, "image", "") == []
    assert describe_test(0.02, 0.01, "image", "") == ["warning: on test images the drop is 2.00 points, more than 1"]
