"""Which network the page recommends, what its charts show, and that it is one file that runs nothing foreign."""

import itertools
import json
import math
import os
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import micronet
from micronet.artifact.artifact import load
from micronet.core.metrics import EQUAL_DB
from micronet.evaluation.cost import count_macs
from micronet.evaluation.report import Row
from micronet.reporting import charts, layers, verdict
from micronet.reporting.charts import Point
from micronet.reporting.curves import training_charts
from micronet.reporting.histograms import weight_panels
from micronet.reporting.page import Page, Section, write_page
from micronet.reporting.pareto import trade_offs
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.tasks.classification import Classification

FIGURES = dict.fromkeys(Row._fields, 0) | {
    "stages": [],
    "metrics": {"accuracy": 0.9},
    "accuracy": 0.9,
    "agreement": 1.0,
}
HOSTILE = "</script><script>alert(1)</script>\x1b[31m\ud800"


def row(name, runtime="onnxruntime", **figures):
    given = FIGURES | {"name": name, "runtime": runtime, "latency_ms": 2.0, "size_bytes": 1000} | figures
    return Row(**given)


NOTHING = "Ship a: none of the others is faster within a drop of 1 point."


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], "a is alone; name further networks to choose from."),
        (
            [row("b", latency_ms=1.0, size_bytes=250)],
            "Ship b: 4.0x smaller than a, the same accuracy; 2.0x faster than a.",
        ),
        ([row("b", latency_ms=1.0, drop=0.02)], NOTHING),
        ([row("b", latency_ms=2.01, size_bytes=500)], "Ship b: 2.0x smaller than a, the same accuracy; as fast as a."),
        (
            [row("b", latency_ms=1.0, size_bytes=1030, drop=0.005)],
            "Ship b: 3% larger than a, -0.50 points; 2.0x faster than a.",
        ),
        ([row("b", "torch", stages=["quantize"], latency_ms=0.1)], NOTHING),
        (
            [row("b", "packed", latency_ms=0.5)],
            "Ship b in packed: as large as a, the same accuracy; 4.0x faster than a in onnxruntime.",
        ),
        (
            [row("b", "packed", stages=["quantize"], latency_ms=0.5), row("c", "packed", latency_ms=0.6)],
            "Ship b in packed: as large as a, the same accuracy; 1.2x faster than c.",
        ),
    ],
    ids=[
        "alone",
        "better",
        "inaccurate",
        "as-fast-and-smaller",
        "larger",
        "simulated",
        "another-runtime",
        "float-in-that-runtime",
    ],
)
def test_the_verdict_is_the_smallest_of_the_fastest_within_the_drop(others, expected):
    assert verdict.sentence([row("a"), *others], 1.0, "accuracy").rstrip() == expected


def test_the_verdict_and_the_table_are_of_the_tasks_main_metric():
    figures = {"accuracy": None, "agreement": None}
    rows = [
        row("a", **figures, metrics={"psnr": math.inf, "error": 0.0}),
        row("b", **figures, latency_ms=1.0, drop=0.001, metrics={"error": 0.001}),
    ]
    assert verdict.sentence(rows, 1.0, "error").startswith("Ship b: as large as a, error 0.0010; 2.0x faster than a.")
    page = Page("", "", [], [], rows, 1, "", [], [], None)
    assert [[cell.text for cell in cells[1:3]] for cells in page.table] == [["inf", "0.0000"], ["nan", "0.0010"]]
    assert page.columns[1:3] == ["psnr", "error"]


@pytest.mark.parametrize("values", [[1, 2, 3], [5, 5], [0, 0], [0.001, 40], [-3, 1e6], [99.72, 100]], ids=str)
def test_axes_hold_every_value_and_round_ticks(values):
    axis = charts.Axis(values, 0, 100, log=True)
    assert all(0 < axis.at(value) < 100 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(0 <= tick.at <= 100 and tick.at == pytest.approx(axis.at(float(tick.text)), abs=0.1) for tick in ticks)


def test_names_cover_neither_points_nor_one_another():
    points = [Point(f"network{index}.onnx", 1 + 0.01 * index, 90.0) for index in range(6)]
    marks = charts.trade_off("", points, ("ms", "accuracy")).marks
    boxes = []
    for mark in marks:
        width = charts.LETTER * len(mark.text)
        left = mark.label.x - width if mark.label.anchor == "end" else mark.label.x
        boxes.append((left, left + width, mark.label.y - charts.LINE / 3))
    boxes += [(mark.at[0] - charts.RADIUS, mark.at[0] + charts.RADIUS, mark.at[1]) for mark in marks]
    names = boxes[: len(marks)]
    for name, other in itertools.product(names, boxes):
        overlap = name[0] < other[1] and other[0] < name[1] and abs(name[2] - other[2]) < charts.LINE - 0.01
        assert name is other or not overlap


def test_damaged_metrics_are_left_out(tmp_path):
    good = [
        {"epoch": 1, "loss": 2.0, "validation_accuracy": 0.5},
        {"epoch": 2, "loss": 1.0, "validation_accuracy": 0.7},
    ]
    (tmp_path / "a.metrics.jsonl").write_text("\n".join(map(json.dumps, good)))
    large = f'{{"epoch": 1, "loss": 1{"0" * 400}}}\n{{"epoch": 2, "loss": -1e308}}'
    (tmp_path / "b.metrics.jsonl").write_text(f'{{"epoch": 1, "loss": NaN}}\n[1]\n{{"loss": 3}}\n{large}')
    (tmp_path / "c.metrics.jsonl").write_bytes(b"\xff{{{")
    (tmp_path / "d.metrics.jsonl").mkdir()
    found = training_charts(tmp_path / f"{name}.safetensors" for name in "abcde")
    assert [(chart.title, [line.name for line in chart.lines]) for chart in found] == [
        ("validation accuracy", ["a"]), ("loss", ["a"]),
    ]  # fmt: skip


def test_trainings_of_the_same_name_are_two_curves(tmp_path, monkeypatch):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}')
    found = training_charts([tmp_path / folder / "x.safetensors" for folder in "ab"])
    assert [line.name for chart in found for line in chart.lines] == ["a/x", "b/x"]
    monkeypatch.chdir(tmp_path)
    assert training_charts([Path()]) == []


def test_a_training_of_any_name_is_drawn(micronet, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a$\\frac$\x1b.metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0, "validation_$^$": 2}')
    done = micronet("plot", tmp_path, "-o", tmp_path / "a.svg")
    assert done.code == 0 and "\x1b" not in (tmp_path / "a.svg").read_text(), done.err


def test_the_page_is_one_file_in_which_names_are_text(tmp_path):
    rows = [row(HOSTILE), row("b", latency_ms=1.0)]
    section = Section(HOSTILE, [HOSTILE], [layers.Layer(HOSTILE, HOSTILE, HOSTILE, None)])
    charts = [each.chart() for each in trade_offs(rows, Classification())]
    texts = {"title": HOSTILE, "verdict": HOSTILE, "warnings": [HOSTILE], "words": [HOSTILE], "tested_on": HOSTILE}
    page = Page(
        **texts, rows=rows, chosen=1, charts=charts, sections=[section], disagreement=None, about={"a": HOSTILE}
    )
    write_page(tmp_path / "report.html", page)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script>") == 1 and "alert(1)</script>" not in text and not set(text) & {"\x1b", "\ud800"}
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", text)


def test_the_layers_add_up(chain):
    inputs = torch.rand(2, 3, 32, 32).numpy()
    paths = [chain / name for name in ("float.safetensors", "fused.safetensors", "int8.onnx")]
    networks = [open_network(path, RuntimeOptions()) for path in paths]
    twin = open_network(paths[0], RuntimeOptions()), paths[0]
    found = [
        layers.layers_of(path, each, networks[0], paths[0], inputs) for path, each in zip(paths, networks, strict=True)
    ]
    assert sum(each.macs for each in found[0]) == count_macs(load(paths[0]).model, torch.rand(1, 3, 32, 32))
    assert [each.name for each in found[0]] == [each.name for each in found[2] if each.name != layers.OTHERS]
    assert all(each.latency_ms and each.precision == "int8" for each in found[2][:-1])
    assert all(each.snr_db is None for each in found[0])
    assert all(each.snr_db is None or math.isfinite(each.snr_db) for each in found[1])
    assert {each.snr_db for each in layers.layers_of(paths[0], networks[0], *twin, inputs)} == {EQUAL_DB}


def test_compare_and_report_write_the_page(micronet, chain, tmp_path):
    page = tmp_path / "page.html"
    done = micronet("compare", chain / "float.safetensors", chain / "int8.onnx", "--html", page, "--limit", 40)
    assert done.code == 0 and f"wrote {page}" in done.out
    assert "Ship " in page.read_text() and "Where they disagree" in page.read_text()
    assert "-o 2-quantize.safetensors" in page.read_text() and str(chain) not in page.read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.engine").touch()
    (empty / "recipe.json").write_text("5")
    for given, message in (
        (empty, "has no networks in it"),
        (page, "is not a folder"),
        (tmp_path / "no", "is not a folder"),
    ):
        refused = micronet("report", given)
        assert refused.code == 2 and message in refused.err
    assert "left out a.engine: " in micronet("report", empty).err


def test_a_broken_file_is_named_and_the_others_are_shown(micronet, chain, tmp_path):
    for name in ("float.onnx", "int8.onnx"):
        (tmp_path / name).hardlink_to(chain / name)
    (tmp_path / "broken.onnx").write_bytes((chain / "float.onnx").read_bytes()[:2000])
    taken = onnx.load(chain / "float.onnx")  # opens, but cannot run on these images
    taken.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(taken, tmp_path / "other.onnx")
    for entry in taken.metadata_props:
        entry.value = entry.value.replace('"image_size": 32', '"image_size": 48')
    onnx.save(taken, tmp_path / "odd.onnx")
    os.utime(tmp_path / "odd.onnx", (0, 0))  # the first of the folder, so the reference
    options = (tmp_path, "--limit", 40, "--skip-timing", "--json")
    done = micronet("report", *options)
    assert done.code == 1 and done.err.startswith("error: left out 3 networks: broken.onnx: ")
    found = json.loads(done.out)
    assert [row["name"] for row in found["rows"]] == ["float.onnx", "int8.onnx"]
    assert list(found["left_out"]) == ["broken.onnx", "odd.onnx", "other.onnx"]
    said = found["left_out"]["odd.onnx"]
    assert "image_size 48, but another file expects 32" in said and "drops are relative to float.onnx" in said
    page = (tmp_path / "report.html").read_text()
    assert "Left out: broken.onnx: " in page and "Left out: other.onnx: " in page
    pytest.importorskip("matplotlib")
    done = micronet("plot", *options, "--what", "pareto", "-o", tmp_path / "a.svg")
    assert done.code == 1 and "left out 3 networks: broken.onnx: " in done.err
    assert json.loads(done.out)["drawn"] == ["float.onnx", "int8.onnx"] and (tmp_path / "a.svg").exists()
    refused = micronet("plot", tmp_path / "int8.onnx", *options[1:], "--what", "pareto", "-o", tmp_path / "b.svg")
    assert refused.code == 2 and "--what pareto compares networks; got 1 network" in refused.err


def test_a_browser_sorts_the_table_without_complaint(chain, tmp_path, micronet):
    api = pytest.importorskip("playwright.sync_api")
    import shutil

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    page = tmp_path / "page.html"
    micronet(
        "compare", chain / "float.safetensors", chain / "int8.onnx", "--html", page, "--limit", 40, "--skip-timing"
    )
    with (
        api.sync_playwright() as played,
        played.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as opened,
    ):
        complaints = []
        for width in (390, 1400):  # a phone, a desk
            tab = opened.new_page(viewport={"width": width, "height": 800})
            tab.on("console", lambda message: complaints.append(message.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.goto(page.as_uri())
            head = tab.get_by_role("button", name="bytes").first
            sizes = []
            for _ in range(2):
                head.focus()
                tab.keyboard.press("Enter")
                cells = tab.locator("table.sortable").first.locator("tbody tr td:nth-child(4)").all_inner_texts()
                sizes.append([int(cell.replace(",", "")) for cell in cells])
            assert sizes == [sorted(sizes[0]), sorted(sizes[0], reverse=True)] and not complaints
            assert tab.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("what", ["curves", "weights", "activations"])
def test_plot_draws(micronet, chain, tmp_path, what, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("micronet.stages.plot.MOST_PANELS", 2)
    picture = tmp_path / "a.svg"
    done = micronet("plot", chain / "int8.safetensors", "--what", what, "-o", picture, "--limit", 40, "--json")
    assert done.code == 0, done.err
    drawn = json.loads(done.out)["drawn"]
    assert picture.read_text().startswith("<?xml") and len(drawn) > 0
    assert what == "curves" or (len(drawn) == 2 and "drew the first 2 of" in done.err)
    refused = micronet("plot", chain / "float.safetensors", "--what", "activations", "-o", picture)
    assert refused.code == 2 and "has no quantized activations" in refused.err


@pytest.mark.parametrize(
    ("bits", "levels"), [("binary", [-1, 1]), ("ternary", [-1, 0, 1]), (3, range(-3, 4)), (8, [-127, 127])]
)
def test_weights_are_drawn_in_steps_of_their_grid(bits, levels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 3))
    how = {"w_bits": bits, "a_bits": 32, "first_last": "same"}
    quantized = micronet.quantize(model, **how).model
    micronet.calibrate(quantized, [torch.rand(2, 3, 9, 9)])
    panels = weight_panels(quantized)
    assert [panel.title for panel in panels] == ["0", "1", "2"]
    for panel, layer in zip(panels, model, strict=True):
        assert panel.levels == list(levels) and panel.counts.sum() == layer.weight.numel()
        if isinstance(bits, int):  # the largest weight of a channel is the grid's end
            assert max(abs(panel.edges)) == pytest.approx(levels[-1], rel=1e-6)
