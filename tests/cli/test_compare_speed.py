"""What ``compare`` says of the speed of quantized and pruned networks."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from micronet.core.timing import is_slower
from micronet.evaluation.report import Row
from micronet.runtimes.c.sizes import CSizes
from micronet.stages import compare_latency
from micronet.stages.words import OTHER_WIDTHS

FIGURES = dict.fromkeys(Row._fields, 0) | {"metrics": {}}
COUNTS = {
    "convolutions": {"integer": 1, "all": 2}, "linear": {"integer": 0, "all": 0}, "float": {"a": "its input is float"},
}  # fmt: skip


def row(name, runtime, latency_ms, *stages):
    return Row(**FIGURES | {"name": name, "runtime": runtime, "stages": list(stages), "latency_ms": latency_ms})


def describe(rows):
    return compare_latency.describe_speed(rows, [Path()] * len(rows), [each.name for each in rows])


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (row("p", "torch", 3.0, "prune"), [f"p is slower than a: 3.00 ms vs. 2.00 ms for a; {OTHER_WIDTHS}"]),
        (row("p", "torch", 1.9, "prune"), []),
        (
            row("q", "torch", 3.0, "quantize"),
            [f"q is slower than a: 3.00 ms vs. 2.00 ms for a; {compare_latency.SIMULATED}"],
        ),
        (row("other", "torch", 9.0), []),
        (
            row("i", "onnxruntime", 0.9, "prune", "quantize"),  # a float network pruned alike is its measure
            [
                "i: 1 of 2 convolutions run in integer arithmetic; 0.90 ms vs. 1.00 ms for c",
                "i: float: a: its input is float",
            ],
        ),
    ],
)
def test_networks_slower_than_a_float_one_beside_them_are_named(own, expected, monkeypatch):
    monkeypatch.setattr(compare_latency, "integer_layers", lambda name: COUNTS if name == "i" else None)
    floats = [row("a", "torch", 2.0), row("b", "onnxruntime", 0.5), row("c", "onnxruntime", 1.0, "prune")]
    found = describe([*floats, own])
    assert [line for line in found if not line.startswith("c is slower")] == expected
    alone = describe([own])
    assert not any("slower" in line for line in alone)


def test_a_slow_integer_file_comes_first_with_its_cause(monkeypatch):
    monkeypatch.setattr(compare_latency, "integer_layers", lambda name: COUNTS if name == "i" else None)
    found = describe([row("a", "onnxruntime", 1.0), row("i", "onnxruntime", 2.0)])
    assert found[0].startswith("i is slower than a: 2.00 ms vs. 1.00 ms for a; ") and "--exclude" in found[0]


def test_a_quantized_file_that_changes_nothing_is_suspect(monkeypatch):
    monkeypatch.setattr(compare_latency, "integer_layers", lambda name: COUNTS if name == "i" else None)
    rows = [row(name, "onnxruntime", 1.0)._replace(metrics={"sqnr_db": 300.0}) for name in "ai"]
    assert describe(rows)[-1].startswith("i: its outputs equal those of a exactly, as constants such as zeros do")


def test_a_file_in_two_runtimes_is_named_with_them(monkeypatch):
    monkeypatch.setattr(compare_latency, "integer_layers", lambda name: COUNTS)
    found = describe([row("i", "onnxruntime", 1.0), row("i", "openvino", 2.0)])
    assert list(dict.fromkeys(line.partition(":")[0] for line in found)) == ["i in onnxruntime", "i in openvino"]
    floats = [row("a", "torch", 1.0), row("f", "onnxruntime", 1.0)]
    monkeypatch.setattr(compare_latency, "integer_layers", lambda name: COUNTS if name == "i" else None)
    found = describe([*floats, row("i", "onnxruntime", 2.0), row("i", "openvino", 2.0)])
    assert found[0].startswith("i in onnxruntime is slower than f: 2.00 ms vs. 1.00 ms for f;")
    assert found[1].startswith("i in openvino is slower than a in torch: 2.00 ms vs. 1.00 ms for a in torch;")


@pytest.mark.parametrize("theirs", [0.046, 0.05, 1.0, 100.0])
def test_times_that_are_printed_alike_or_differ_by_noise_are_not_called_slower(theirs):
    assert not any(
        "slower" in line for line in describe([row("a", "torch", theirs), row("q", "torch", theirs * 1.04, "quantize")])
    )
    alike = row("q", "torch", theirs + 0.019, "quantize")
    assert not any("slower" in line for line in describe([row("a", "torch", theirs), alike]))


def test_a_difference_that_a_call_costs_is_not_the_networks():
    assert not is_slower(0.04, 0.03)
    assert is_slower(0.06, 0.03) and not is_slower(0.03, 0.06)


def test_a_network_in_c_tells_its_memory():
    network = SimpleNamespace(memory=CSizes(1234, 56, []).describe)
    found = compare_latency.describe_speed([row("c", "c", 1.0)], [Path()], [network])
    assert found == ["c: flash 1,234 bytes without code, RAM 56 bytes"]
