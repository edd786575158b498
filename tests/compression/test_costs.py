"""What layers and networks cost: timed alone, predicted, and corrected by whole networks."""

import time

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from micronet.compression import costs
from micronet.compression.correction import Correction
from micronet.compression.costs import CostTable, Deployment, fastest_ms
from micronet.compression.groups import Groups
from micronet.compression.layers import Shape, find_layers
from micronet.compression.notes import Notes
from micronet.compression.onnx_layer import make_layer
from micronet.compression.plan import Plan
from micronet.compression.point import Point
from micronet.compression.prediction import Prediction
from micronet.compression.workshop import Workshop
from micronet.core.progress import Silent

SHAPES = [
    Shape("Conv", 4, 6, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1, (3, 3)),
    Shape("Conv", 4, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 4, (5, 5)),
    Shape("Conv", 4, 6, (9,), (3,), (1,), (0,), (2,), 2, (5,)),
    Shape("ConvTranspose", 4, 6, (5, 5), (2, 2), (2, 2), (0, 0), (1, 1), 1, (10, 10)),
    Shape("Linear", 4, 6),
    Shape("Linear", 4, 6, (7,), results=(7,)),
]


@pytest.mark.parametrize(("layers", "terms"), [(1, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("form", ["float", "int8", "float alone", "int8 alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}-{shape.groups}-{len(shape.sizes)}")
def test_a_layer_alone_computes_the_results_of_its_shape(shape, form, layers, terms):
    proto, sample = make_layer(shape, form, batch=2, layers=layers, terms=terms)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"x": sample})
    expected = (2, *shape.results, shape.outputs) if shape.kind == "Linear" else (2, shape.outputs, *shape.results)
    assert result.shape == expected
    assert (result.dtype == np.uint8) == (form in ("int8", "float alone"))


def test_a_layer_is_timed_once_on_each_machine(tmp_path, monkeypatch):
    timed = []

    def time_layers(keys, deployment):
        timed.extend(keys)
        return 0.5, [float(len(timed))] * len(keys)

    monkeypatch.setattr(costs, "time_layers", time_layers)
    here, there = Deployment("onnxruntime"), Deployment("onnxruntime", batch=8)
    wanted = [(shape, "float") for shape in SHAPES]
    for deployment, times in ((here, 1), (here, 0), (there, 1)):
        timed.clear()
        table = CostTable.open(deployment, tmp_path, 60.0, Silent())
        table.measure([*wanted, *wanted])
        assert len(timed) == times * len(SHAPES)
        assert table.call_ms == 0.5
        assert all(table.ms(*key) is not None for key in wanted)


def test_time_in_which_other_work_runs_does_not_count_in_one_thread():
    def interrupted(_):
        time.sleep(0.005)

    runs = [(interrupted, np.zeros(1))]
    [alone], [whole] = (fastest_ms(runs, 0.0, one_thread=one_thread) for one_thread in (True, False))
    assert alone < 2.5
    assert whole >= 5.0


def test_a_short_call_is_timed_with_its_caches_filled(monkeypatch):
    """The first call after another network takes longer, and would say more of that one than of its own."""
    last, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def network(name):
        def call(_):
            now[0] += 0.0005 if last == [name] else 0.002
            last[:] = [name]

        return call

    times = fastest_ms([(network("a"), np.zeros(1)), (network("b"), np.zeros(1))], 0.01)
    assert times == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("moments", "number", "expected"),
    [
        ([(1.0, 0.5), (1.01, 0.505)], 2, 0.5),
        ([(1.2, 0.5), (1.3, 0.5), (1.0, 0.5)], 3, 0.5),  # the original is slower than it was
        ([(1.0, 0.6), (1.0, 0.5), (1.0, 0.51)], 3, 0.5),  # or the two shortest times differ
        ([(2.0, 1.0)] * 9, 6, 0.5),  # the machine is slower now, for both
    ],
    ids=["steady", "original slower", "network differs", "slower machine"],
)
def test_other_work_is_waited_for(monkeypatch, tmp_path, moments, number, expected):
    given = (None, tmp_path, Notes(tmp_path / "n.json", ""), None, Deployment("onnxruntime"), Silent(), 1.0)
    workshop = Workshop(*given, points=[Point("float", Plan(), latency_ms=1.0)])
    taken = [list(each) for each in moments]
    monkeypatch.setattr(Workshop, "open", lambda *_: None)
    monkeypatch.setattr(Workshop, "_times", lambda *_: taken.pop(0))
    assert workshop._latency(Plan(bits=8), [taken.pop(0)]) == pytest.approx(expected)
    assert len(moments) - len(taken) == number


def test_a_layer_for_which_there_is_no_time_costs_by_its_macs(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "time_layers", lambda keys, _: (0.0, [1.0] * len(keys)))
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    example = torch.rand(1, 8)
    groups = Groups.find(model, example)
    table = CostTable.open(Deployment("onnxruntime"), tmp_path, 60.0, Silent())
    predict = Prediction("latency", find_layers(model, example, groups.channels), groups.widths, table)
    predict.prepare([Plan()])
    predict.fit(Plan(), 2.0)
    assert predict(Plan()) == 2.0
    assert predict(Plan(widths=(4,))) == 2 * 4 / 16


@pytest.mark.parametrize("measured", [0.5, 2.0, 9.0])
def test_a_fitted_prediction_is_what_was_measured(tmp_path, monkeypatch, measured):
    """Whether the layers take longer alone than together, or the network has more to do than its layers."""
    monkeypatch.setattr(costs, "time_layers", lambda keys, _: (0.25, [1.0] * len(keys)))
    model, example = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), torch.rand(1, 8)
    table = CostTable.open(Deployment("onnxruntime"), tmp_path, 60.0, Silent())
    predict = Prediction("latency", find_layers(model, example, None), {}, table)
    predict.prepare([Plan(), Plan(bits=8)])
    mixed = Plan(bits=8, floats=("0",))
    measured_ms = {Plan(): measured, Plan(bits=8): 3.0, mixed: 4.0}
    for plan, cost in measured_ms.items():
        predict.fit(plan, cost)
    assert {plan: predict(plan) for plan in measured_ms} == pytest.approx(measured_ms)


def test_whole_networks_correct_the_sum_of_layers():
    """A measured network is met, between two the ratio lies between theirs, beyond it is the nearest one's."""
    correction = Correction()
    correction.add(1.0, 1.0)  # what the prediction was fitted to
    assert correction(0.3) == 0.3
    correction.add(0.2, 0.25)
    assert correction(0.2) == pytest.approx(0.25)
    assert correction(1.0) == pytest.approx(1.0)
    ratios = [correction(cost) / cost for cost in (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 2.0)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx(1.25)
    assert ratios[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_corrected_cost_rises_with_the_predicted_one(seed):
    """Whatever was measured: the walk and the bisection rely on it."""
    random, correction = np.random.default_rng(seed), Correction()
    for predicted in [1.0, 1.0, 1.01, *random.uniform(0.1, 1.2, 2 * seed)]:
        correction.add(predicted, predicted * random.lognormal(sigma=0.2))
    correction.add(0.5, float("inf"))
    costs = np.geomspace(0.05, 2.0, 400)
    assert np.all(np.diff([correction(cost) for cost in costs]) > 0)


def test_layers_of_an_encoder_are_found_behind_padding():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 8, padding_idx=0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, ids):
            return self.encoder(self.words(ids), src_key_padding_mask=ids == 0).mean(1)

    found = find_layers(Encoder().eval(), torch.tensor([[3, 4, 0]]), None)
    assert found["encoder.layers.0.linear1"].shape.sizes == (3,)
