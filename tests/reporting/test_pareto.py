"""Which networks a Pareto chart shows and its line joins, and that the others are named."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from micronet.errors import MicronetError
from micronet.reporting import charts
from micronet.reporting.charts import Point
from micronet.reporting.pareto import trade_offs
from micronet.stages.plot import Plot
from micronet.tasks.classification import Classification
from tests.reporting.test_page import row


def test_the_pareto_line_is_what_no_other_point_beats():
    for seed in range(50):
        torch.manual_seed(seed)
        points = [Point("", *pair) for pair in torch.randint(0, 6, (8, 2)).tolist()]

        def beaten(point, points=points):
            return any(
                other.cost <= point.cost and other.quality >= point.quality and other[1:] != point[1:]
                for other in points
            )

        assert {points[index] for index in charts.frontier(points)} == {each for each in points if not beaten(each)}


def test_a_chart_holds_every_network_or_names_it(monkeypatch):
    drops = {"a": 0, "b": 0.1, "c": 0.25, "d": 0.3}
    rows = [row(name, drop=drop, metrics={"accuracy": 0.9 - drop}) for name, drop in drops.items()]
    for some in itertools.chain.from_iterable(itertools.combinations(rows, size) for size in (2, 3, 4)):
        for each in trade_offs(some, Classification()):
            assert sorted([*(point.name for point in each.points), *each.hidden]) == [one.name for one in some]
            assert each.hidden == [one.name for one in some if one.drop > 0.2] * ({"a", "b"} <= {x.name for x in some})
        assert len(trade_offs(some, Classification())) == 2
    measured = SimpleNamespace(rows=rows, dataset=SimpleNamespace(task=Classification()))
    monkeypatch.setattr("micronet.stages.measure.measure", lambda *given, **options: measured)
    monkeypatch.setattr("micronet.reporting.pareto.draw", lambda found, path: None)
    said = []
    context = SimpleNamespace(progress=SimpleNamespace(line=said.append))
    plot = Plot.configure({"files": [Path("a.onnx")], "what": "pareto"})
    summary = plot.run(context).summary
    assert summary["drawn"] == ["a", "b"] and summary["hidden"] == ["c", "d"] and "c, d" in said[0]
    measured.rows = [row("a"), row("b", metrics={"accuracy": math.nan})]
    with pytest.raises(MicronetError, match="fewer than two of 2 networks"):
        plot.run(context)
