"""The gates of ``compare``, its files for CI servers, and its table on narrow terminals."""

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

import micronet as api
from micronet.cli import console
from micronet.cli.measures import show_comparison
from micronet.core.metrics import drop_text
from micronet.errors import FailedError, MicronetError
from micronet.evaluation.report import LATENCIES, Row
from micronet.stages.compare_latency import BUSY, describe_noise
from micronet.stages.comparison_files import write_csv, write_junit
from micronet.stages.gates import GateConfig, require, verdicts

HOSTILE = 'a\x1b[2J<&">\udc80\u202e.onnx'


def row(name, **figures):
    common = {"name": name, "runtime": "onnxruntime", "stages": ["train"], "images": 360, "accuracy": 0.9, "loss": 0.1,
              "drop": 0.0, "agreement": 1.0, "macs": 16_700_000, "params": 64_494, "size_bytes": 1000,
              "compression": 0.0, "metrics": {"accuracy": 0.9, "loss": 0.1}}  # fmt: skip
    return Row(**{**common, **dict.fromkeys(LATENCIES, 2.0), **figures})


FIRST = row("a.onnx")
AT_LIMIT = {  # a gate -> a limit that the figures just meet, and the figures one step beyond
    "max_drop": (1.0, {"drop": 0.01}, {"drop": 0.0101}),
    "max_size": (500, {"size_bytes": 500}, {"size_bytes": 501}),
    "min_speedup": (2.0, {"latency_ms": 1.0}, {"latency_ms": 1.001}),
    "max_latency": (1.0, {"latency_ms": 1.0}, {"latency_ms": 1.001}),
    "min_agreement": (99.0, {"agreement": 0.99}, {"agreement": 0.9899}),
}


@pytest.mark.parametrize("gate", AT_LIMIT)
def test_a_gate_holds_at_its_limit_and_fails_beyond_it_naming_row_and_figure(gate):
    limit, meets, breaks = AT_LIMIT[gate]
    gates, option = GateConfig(**{gate: limit}), f"--{gate.replace('_', '-')}"
    require(verdicts([FIRST, row("b.onnx", **meets)], gates))
    with pytest.raises(FailedError, match=rf"b\.onnx .*{option}") as caught:
        require(verdicts([FIRST, row("b.onnx", **meets), row("b.onnx", runtime="openvino", **breaks)], gates))
    assert str(caught.value).startswith("b.onnx in openvino ") and "\n" not in str(caught.value)


def test_an_accuracy_that_is_nan_fails_and_other_metrics_have_units_of_their_own():
    with pytest.raises(FailedError, match=r"b is nan percentage points less accurate than a\.onnx"):
        require(verdicts([FIRST, row("b", drop=float("nan"))], GateConfig(max_drop=1)))
    with pytest.raises(
        FailedError, match=r"worse than a\.onnx by 25\.7000 in the main metric; --max-drop 5 allows 0\.05$"
    ):
        require(verdicts([FIRST, row("b", accuracy=None, drop=25.7)], GateConfig(max_drop=5)))
    assert (drop_text("accuracy", 0.031), drop_text("rmse", 25.7)) == ("+3.10 pt", "+25.7000")


def test_a_size_up_to_one_is_a_fraction_of_the_first_files():
    half = GateConfig(max_size=0.5)
    require(verdicts([FIRST, row("b", size_bytes=500)], half))
    with pytest.raises(FailedError, match=r"501 bytes, 50\.10% of a\.onnx's; --max-size allows 50\.00%"):
        require(verdicts([FIRST, row("b", size_bytes=501)], half))


def test_the_first_network_is_the_reference_unless_it_is_the_only_one():
    small = GateConfig(max_size=900)
    require(verdicts([FIRST, row("b", size_bytes=900)], small))
    with pytest.raises(FailedError, match="1,000 bytes"):
        require(verdicts([FIRST], small))


def test_all_failures_are_counted_in_one_line():
    gates = GateConfig(max_size=10, max_latency=1.0)
    with pytest.raises(FailedError, match=r"and 1 more: b fails --max-latency\)$"):
        require(verdicts([FIRST, row("b")], gates))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "--min-speedup", "2"], "--min-speedup compares with the first network; add a second one"),
        (["A", "--max-size", "0.5"], "--max-size compares with the first network"),
        (["A", "B", "--max-latency", "2", "--skip-timing"], "--max-latency needs latencies"),
        (["A", "B", "--max-size", "1.5"], "--max-size is 1.5; expected a number of bytes"),
        (["A", "B", "--min-agreement", "0.99"], "--min-agreement is 0.99; allowed: 2 to 100"),
        (["A", "B", "--junit", "j.xml"], "--junit reports on gates, and none is set"),
        (["A", "B", "--csv", "no/r.csv"], "mkdir -p"),
        (["A", "B", "--html", "b.safetensors"], "b.safetensors ends in .safetensors, as an artifact does"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_gates_without_effect_are_refused_before_any_work(micronet, chain, words, message):
    places = {"A": chain / "float.onnx", "B": chain / "int8.onnx"}
    done = micronet("compare", *(places.get(word, word) for word in words))
    assert (done.code, done.out) == (2, "") and message in done.err


def test_agreement_is_of_classifiers_alone():
    with pytest.raises(MicronetError, match="only applies to classification"):
        verdicts([row("a", agreement=None), row("b", agreement=None)], GateConfig(min_agreement=99))


def test_the_command_the_recipe_and_python_fail_alike_and_write_the_files(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(chain / "float.onnx"), str(chain / "int8.onnx")]
    done = micronet("compare", *files, "--skip-timing", "--max-size", 10, "--csv", "r.csv", "--junit", "j.xml")
    message = done.err.removeprefix("error: ").strip()
    assert done.code == 1 and message.startswith("int8.onnx has ") and message.endswith("; --max-size allows 10")
    [case] = ElementTree.parse("j.xml").findall("./testsuite/testcase")
    assert case.find("failure").attrib["message"] == message
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert [each["name"] for each in rows] == ["float.onnx", "int8.onnx"]
    assert [int(each["size_bytes"]) for each in rows] == [Path(each).stat().st_size for each in files]
    assert rows[0]["latency_ms"] == ""
    with pytest.raises(FailedError, match="max_size") as caught:
        api.compare(files, skip_timing=True, max_size=10)
    assert str(caught.value) == message.replace("--max-size", "max_size")
    Path("r.toml").write_text(
        f'[[stage]]\ncommand = "compare"\nfiles = {files}\nskip_timing = true\nmax_size = 10\njunit = "k.xml"\n'
    )
    assert micronet("run", "r.toml").code == 1
    assert Path("k.xml").read_text() == Path("j.xml").read_text()


def test_junit_has_the_documented_shape_whatever_files_are_called(tmp_path):
    found = verdicts([FIRST, row("b"), row(HOSTILE, size_bytes=9)], GateConfig(max_size=10, max_drop=1))
    write_junit(tmp_path / "j.xml", found)
    root = ElementTree.parse(tmp_path / "j.xml").getroot()
    [suite] = root
    cases = list(suite)
    assert (root.tag, suite.tag, {case.tag for case in cases}) == ("testsuites", "testsuite", {"testcase"})
    for element in (root, suite):
        assert {"name": "micronet compare", "tests": "5", "failures": "1", "errors": "0"}.items() <= dict(
            element.attrib
        ).items()
    assert len(cases) == len(found) and len({case.attrib["name"] for case in cases}) == len(cases)
    assert all({"name", "classname", "time"} == set(case.attrib) for case in cases)
    [failure] = [case[0] for case in cases if len(case)]
    assert failure.tag == "failure" and {"message", "type"} == set(failure.attrib)
    write_csv(tmp_path / "r.csv", [row(HOSTILE, metrics={"accuracy": 1.0, "mean_iou": 0.5})])
    [line] = csv.DictReader((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines())
    assert line["mean_iou"] == "0.5" and line["name"] == 'a\\x1b[2J<&">\\udc80\\u202e.onnx'


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t=", "\r="])
def test_no_name_in_a_csv_file_is_a_formula(tmp_path, first):
    name = f"{first}cmd()"
    write_csv(tmp_path / "r.csv", [row(name, drop=-0.5, metrics={"accuracy": 1.0, name: -1.0})])
    head, cells = csv.reader((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines())
    assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in [*head, cells[0]])
    assert cells[0].endswith("cmd()") and {"-0.5", "-1.0"} <= set(cells)


def test_a_busy_machine_is_named_once():
    calm = row("a", latency_p95_ms=2.0 * BUSY)
    assert describe_noise([calm, row("b", **dict.fromkeys(LATENCIES))]) == []
    [line] = describe_noise([row("a", latency_p95_ms=7.0), row("b", latency_batch64_p95_ms=20.0)])
    assert line.startswith("this machine is busy: the p95 of b is 10.0 times its median (20.00 ms vs. 2.00 ms)")


@pytest.mark.parametrize(("width", "kept"), [(60, 4), (100, 8), (200, 13)])
def test_a_narrow_table_drops_columns_and_folds_none(capsys, monkeypatch, width, kept):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(console, "out", Console(width=width, highlight=False, soft_wrap=True))
    rows = [row(name)._asdict() for name in ("float.safetensors", "int8.onnx")]
    show_comparison({"rows": rows, "words": [], "noun": "image", "tested_on": ""})
    title, _, head, *lines = capsys.readouterr().out.splitlines()
    heads = [cell.strip() for cell in head.strip("┃").split("┃")]
    assert len(heads) == kept and {"name", "accuracy", "bytes"} <= set(heads)
    assert title == "360 test images" and len(head) <= width
    assert sum(line.startswith("│") for line in lines) == len(rows)  # no row is folded into several
    if width < 200:
        left_out = lines[-1].partition(": ")[2].removesuffix(" (--json has everything)").split(", ")
        assert len(left_out) == 13 - kept and not set(left_out) & set(heads)
