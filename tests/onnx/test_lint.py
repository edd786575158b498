"""Every rule of the linter finds the graph that breaks it and leaves one that does not; ONNX Runtime confirms it."""

import collections
import platform
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact
from micronet.cli import console
from micronet.models.build import ModelSpec
from micronet.onnx import posttraining
from micronet.onnx.export import to_onnx
from micronet.onnx.integers import count_computed, count_integer_layers
from micronet.onnx.layer_agreement import compare_layers
from micronet.onnx.lint import RULES, lint
from micronet.onnx.rules.layers import CURES, NO_PRUNING
from micronet.onnx.rules.rule import PTQ
from micronet.onnx.rules.storage import STANDARD
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.runtimes.onnxruntime import EXACT_INT8, note, optimize

COMMAND = re.compile(r"micronet ([a-z][a-z-]+)")
WIDTH = 16
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 1)]
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ONNX Runtime's x86 kernels")


class Graph:
    """A graph on the image ``x`` (1, 16, 8, 8), put together tensor by tensor; every method returns a tensor's name."""

    def __init__(self):
        self.nodes, self.stored = [], []

    def put(self, values):
        name = f"stored{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind, *inputs, **attributes):
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def grid(self, x, kind=np.uint8, zero_point=0, scale=0.02):
        scale = self.put(np.float32(scale))
        axis = {"axis": 1} if self.stored[-1].dims else {}
        points = [self.put(np.full(self.stored[-1].dims, zero_point, kind)) for _ in range(2)]
        self.stored[-1].name = points[1] = f"{points[1]}.own"
        return self.op(
            "DequantizeLinear", self.op("QuantizeLinear", x, scale, points[0], **axis), scale, points[1], **axis
        )

    def weight(self, outputs=WIDTH, inputs=WIDTH, kind=np.int8, top=60, point=None):
        q = np.full((outputs, inputs, 1, 1), top, kind)
        point = point or self.put(np.zeros(outputs, kind))
        return self.op("DequantizeLinear", self.put(q), self.put(np.full(outputs, 0.01, np.float32)), point, axis=0)

    def conv(self, x, *more, weight=None):
        return self.op("Conv", x, weight or self.weight(), *more)

    def gemm(self, x):
        q = self.put(np.ones((WIDTH * 64, WIDTH), np.int8))
        return self.op("Gemm", x, self.op("DequantizeLinear", q, self.put(np.float32(0.01)), self.put(np.int8(0))))

    def model(self, output):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH, 8, 8])],
            [helper.make_empty_tensor_value_info(output)],
            self.stored,
        )
        proto = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def two_layers(kind=np.uint8, zero_point=0, between=("Relu",), first_scale=0.02, weight_kind=np.int8, top=60):
    """Return two quantized convolutions with something between each and the grid behind it."""
    g = Graph()
    x = g.grid("x", kind, zero_point, first_scale)
    for _ in range(2):
        x = g.conv(x, weight=g.weight(kind=weight_kind, top=top))
        for op in between:
            x = g.op(op, x)
        x = g.grid(x, kind, zero_point)
    return g.model(x)


def joined(op, both, **attributes):
    g = Graph()
    x = g.grid("x")
    left, right = g.grid(g.conv(x)), g.conv(x)
    return g.model(g.grid(g.op(op, left, g.grid(right) if both else right, **attributes)))


def clipped(high):
    g = Graph()
    y = g.op("Clip", g.conv(g.grid("x")), g.put(np.float32(0)), g.put(np.float32(high)))
    return g.model(g.grid(y))  # whose largest value is 255 * 0.02 = 5.1


def residual_relu(zero_point):
    g = Graph()
    x = g.grid("x")
    return g.model(g.grid(g.op("Relu", g.op("Add", g.grid(g.conv(x)), g.grid(g.conv(x)))), zero_point=zero_point))


def unquantized_output(behind):
    g = Graph()
    y = g.conv(g.grid("x"))
    return g.model(g.grid(g.op("Sigmoid", g.grid(y) if behind else y)))


def moved(op, *shape, kind=np.int8, behind=False, **attributes):
    g = Graph()
    y = g.op(op, g.grid(g.conv(g.grid("x", kind)), kind), *map(g.put, shape), **attributes)
    return g.model(g.grid(y, kind) if behind else y)


def pooled(kind):
    return moved("MaxPool", kind=kind, kernel_shape=[2, 2])


def flattened(op, *shape, behind=False):
    g = Graph()
    y = g.op(op, g.grid(g.conv(g.grid("x"))), *map(g.put, shape))
    return g.model(g.gemm(g.grid(y) if behind else y))


def widths(*widths, grids=True):
    g, x = Graph(), "x"
    for inputs, outputs in zip((WIDTH, *widths[:-1]), widths, strict=True):
        x = g.grid(x) if grids else x
        weight = g.weight(outputs, inputs) if grids else g.put(np.ones((outputs, inputs, 1, 1), np.float32))
        x = g.conv(x, weight=weight)
    return g.model(g.grid(x) if grids else x)


def float_weight(integers):
    g = Graph()
    w = g.weight() if integers else g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32))
    return g.model(g.grid(g.conv(g.grid("x"), weight=w)))


def transposed(grids):
    g = Graph()
    w = g.weight() if grids else g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32))
    return g.model(g.op("ConvTranspose", g.grid("x") if grids else "x", w))


def float_activation(grids):
    g = Graph()
    return g.model(g.grid(g.conv(g.grid("x") if grids else "x")))


def four_bits():
    g = Graph()
    q, point = (helper.make_tensor(name, TensorProto.INT4, dims, np.ones(dims, int).ravel() * value)
                for name, dims, value in (("q", (WIDTH, WIDTH, 1, 1), 3), ("point", (), 0)))  # fmt: skip
    g.stored += [q, point]
    return g.model(g.grid(g.conv(g.grid("x"), weight=g.op("DequantizeLinear", "q", g.put(np.float32(1)), "point"))))


def two_weights(shared=False, top=127):
    g = Graph()
    point = g.put(np.zeros(WIDTH, np.int8)) if shared else None
    x = g.grid("x")
    for _ in range(2):
        x = g.grid(g.conv(x, weight=g.weight(top=top, point=point)))
    return g.model(x)


def two_readers_of_one_weight():
    g = Graph()
    w = g.weight(top=127)
    return g.model(g.grid(g.conv(g.grid(g.conv(g.grid("x"), weight=w)), weight=w)))


def stored_in_float():
    g = Graph()
    w = g.grid(g.put(np.ones((WIDTH, WIDTH, 1, 1), np.float32)), np.int8)
    return g.model(g.grid(g.conv(g.grid("x"), weight=w)))


def with_bias(integers):
    g = Graph()
    bias = g.put(np.ones(WIDTH, np.int32 if integers else np.float32))
    if integers:
        bias = g.op("DequantizeLinear", bias, g.put(np.full(WIDTH, 2e-4, np.float32)), axis=0)
    return g.model(g.grid(g.conv(g.grid("x", np.int8), bias), np.int8))


def foreign(domain):
    g = Graph()
    return g.model(g.op("Relu", "x", domain=domain))


GOOD = two_layers()
SIGNED = two_layers(np.int8, between=())
# rule, target, severity, a graph that breaks it, one that does not
CASES = [
    ("mixed-inputs", "ort", "warning", joined("Add", False), joined("Add", True)),
    ("mixed-inputs", "ort", "warning", joined("Concat", False, axis=1), joined("Concat", True, axis=1)),
    ("kept-activation", "ort", "warning", two_layers(zero_point=128), GOOD),
    ("kept-activation", "ort", "warning", two_layers(np.int8), two_layers(np.int8, -128)),
    ("kept-activation", "ort", "warning", residual_relu(128), residual_relu(0)),
    ("kept-activation", "ort", "warning", clipped(5.0), clipped(6.0)),
    ("float-output", "ort", "warning", unquantized_output(False), unquantized_output(True)),
    ("signed-activations", "ort", "warning", SIGNED, GOOD),
    ("unsigned-integers", "tensorrt", "error", GOOD, SIGNED),
    ("unsigned-integers", "tensorrt", "error", two_layers(np.int8, between=(), weight_kind=np.uint8), SIGNED),
    ("zero-points", "tensorrt", "error", two_layers(np.int8, -128), SIGNED),
    ("activation-scales", "ort", "error", two_layers(first_scale=[0.02] * WIDTH), GOOD),
    ("activation-scales", "tensorrt", "warning", two_layers(first_scale=[0.02] * WIDTH), GOOD),
    ("saturating-weights", "ort", "note", two_layers(top=65), two_layers(top=64)),
    ("channel-widths", "ort", "warning", widths(12, 16), widths(8, 24, 3)),
    ("channel-widths", "ort", "warning", widths(12, 16, grids=False), widths(8, 24, 3, grids=False)),
    ("channel-widths-of-tensorrt", "tensorrt", "warning", widths(24, 16), widths(32, 16, 3)),
    ("channel-widths-of-tensorrt", "tensorrt", "warning", widths(12, 3, grids=False), widths(24, 3, grids=False)),
    ("float-layers", "both", "warning", float_weight(False), float_weight(True)),
    ("quantized-transposed-convolution", "both", "warning", transposed(True), transposed(False)),
    ("float-activations", "ort", "warning", float_activation(False), float_activation(True)),
    ("sixteen-bits", "ort", "warning", two_layers(np.uint16), GOOD),
    ("sixteen-bits", "tensorrt", "error", two_layers(np.int16), SIGNED),
    ("sixteen-bits", "ort", "warning", two_layers(weight_kind=np.int16), GOOD),
    ("four-bit-weights", "ort", "warning", four_bits(), GOOD),
    ("four-bit-weights", "tensorrt", "error", four_bits(), GOOD),
    ("shared-integers", "ort", "error", two_weights(shared=True), two_weights()),
    ("shared-integers", "ort", "error", two_readers_of_one_weight(), two_weights()),
    ("shared-integers", "ort", "error", two_weights(shared=True), two_weights(shared=True, top=60)),
    ("signed-before-move", "ort", "error", moved("Reshape", [1, -1]), moved("Reshape", [1, -1], behind=True)),
    ("signed-before-move", "ort", "error", pooled(np.int8), pooled(np.uint8)),
    ("flatten", "ort", "warning", flattened("Flatten"), flattened("Reshape", [1, -1])),
    ("flatten", "ort", "warning", flattened("Flatten"), flattened("Flatten", behind=True)),
    ("float-storage", "both", "warning", stored_in_float(), GOOD),
    ("int32-bias", "tensorrt", "error", with_bias(True), with_bias(False)),
    ("foreign-operator", "tensorrt", "error", foreign("com.example"), foreign("")),
]


def ids(cases):
    seen = collections.Counter()
    for rule, target, *_ in cases:
        seen[rule, target] += 1
        yield f"{rule}-{target}-{seen[rule, target]}"


@pytest.mark.parametrize(("rule", "target", "severity", "bad", "good"), CASES, ids=ids(CASES))
def test_a_rule_finds_what_breaks_it_and_nothing_else(rule, target, severity, bad, good):
    found = [finding for finding in lint(bad, target) if finding.rule == rule]
    assert {finding.severity for finding in found} == {severity}
    assert all(finding.node and finding.message and finding.cure for finding in found)
    assert rule not in {finding.rule for finding in lint(good, target)}


def test_every_rule_is_broken_here_and_no_two_share_a_name():
    names = [rule.name for rule in RULES]
    assert sorted(names) == sorted({rule for rule, *_ in CASES})


SLOW = {"mixed-inputs", "kept-activation", "float-output", "float-activations", "sixteen-bits", "four-bit-weights"}
PROVABLE = [case for case in CASES if case[0] in SLOW and case[1] == "ort"]


def floats(proto):
    """Return how many layers and additions of activations ONNX Runtime computes in float."""
    found = count_computed(proto)
    integer = {each.op_type for each in optimized(proto)} & {"QLinearAdd"}
    kinds = [found[kind] for kind in ("convolutions", "linear")]
    additions = any(node.op_type == "Add" for node in proto.graph.node) and not integer
    return sum(kind["all"] - kind["integer"] for kind in kinds) + additions


def optimized(proto):
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return optimize(proto.SerializeToString(), level).graph.node


@x86_only
@pytest.mark.parametrize(("rule", "target", "severity", "bad", "good"), PROVABLE, ids=ids(PROVABLE))
def test_onnxruntime_runs_in_float_what_a_rule_says_it_does(rule, target, severity, bad, good):
    assert floats(bad) and not floats(good)


@x86_only
@pytest.mark.parametrize(("bad", "good"), [case[3:] for case in CASES if case[0] == "flatten"])
def test_onnxruntime_rounds_again_behind_a_flatten(bad, good):
    slow, fast = ({node.op_type for node in optimized(model)} for model in (bad, good))
    assert "MatMulNBits" in slow
    assert "MatMulNBits" not in fast


@x86_only
def test_onnxruntime_does_not_load_int8_in_front_of_a_move():
    assert count_integer_layers(pooled(np.int8)) is None
    assert count_integer_layers(pooled(np.uint8)) is not None


@x86_only
@pytest.mark.parametrize("bad", [two_weights(shared=True), two_readers_of_one_weight()], ids=["point", "weight"])
def test_the_exact_arithmetic_of_onnxruntime_does_not_load_shared_integers(bad):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry(EXACT_INT8, "1")
    for proto in (two_weights(), two_weights(shared=True, top=60)):
        onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=r"graph_utils|existing tensor"):
        onnxruntime.InferenceSession(bad.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def test_for_both_targets_the_worse_severity_counts_and_errors_come_first():
    severities = [finding.severity for finding in lint(two_layers(np.uint16), "both")]
    assert severities == sorted(severities)
    assert {finding.severity for finding in lint(two_layers(np.uint16), "both") if finding.rule == "sixteen-bits"} == {
        "error"
    }


def test_constants_made_by_nodes_are_stored_tensors_too():
    proto = two_layers(zero_point=128)
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in proto.graph.initializer]
    rules = {finding.rule for finding in lint(proto, "both")}
    nodes += proto.graph.node
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert {finding.rule for finding in lint(proto, "both")} == rules


def test_the_worst_widths_are_named_first():
    finding = next(f for f in lint(widths(33, 9, 16), "ort") if f.rule == "channel-widths")
    assert "33 outputs" not in finding.message.split(",")[2]
    assert " 9 " in finding.message.partition(":")[2].split(",")[0]


def test_pruning_is_not_advised_for_widths_below_the_multiple():
    proto = widths(33, 4, 16)
    note(proto, model={})
    found = {finding.cure: finding.message for finding in lint(proto, "ort") if finding.rule == "channel-widths"}
    [below], [above] = ([each for each in found if ("prune" in each) == cut] for cut in (False, True))
    assert " 4 " in found[below] and "33" not in found[below]
    assert " 33 " in found[above] and " 4 " not in found[above]


def test_our_int8_file_has_no_error_and_runs_in_integers(micronet, chain):
    shown = micronet("check-onnx", chain / "int8.onnx", "--json")
    assert shown.json["errors"] == 0
    assert {finding["rule"] for finding in shown.json["findings"]} <= {"saturating-weights", "channel-widths"}
    assert shown.json["integers"]["convolutions"] == {"integer": 9, "all": 9}
    counted = [finding for finding in shown.json["findings"] if finding["severity"] != "note"]
    assert len(counted) == shown.json["warnings"]


def test_the_table_says_what_the_rules_say(micronet, chain, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console.out, "width", 200)  # in less, words are folded; set at import if COLUMNS was
    shown = micronet("check-onnx", chain / "int8.onnx", "--target", "tensorrt")
    assert shown.code == 0
    assert "unsigned-integers" in shown.out and "--target tensorrt" in shown.out
    assert "9 of 9 convolutions" in shown.out
    rows = [sum(line.startswith(f"│ {kind}") for line in shown.out.splitlines()) for kind in ("error", "warning")]
    found = re.match(r"(\d+) errors?, (\d+) warnings?( at \d+ nodes)?$", shown.out.splitlines()[-1])
    assert [int(found[1]), int(found[2])] == rows


def test_strict_fails_where_anything_is_found(micronet, chain, tmp_path):
    shown = micronet("check-onnx", chain / "int8.onnx", "--target", "tensorrt", "--strict")
    assert shown.code == 1
    assert "int32-bias" in shown.err and len(shown.err.strip().splitlines()) == 1
    onnx.save(GOOD, tmp_path / "good.onnx")
    assert micronet("check-onnx", tmp_path / "good.onnx", "--strict").code == 0


@pytest.mark.parametrize("content", [b"", b"not a model"], ids=["empty", "text"])
def test_a_broken_file_is_the_users_mistake(micronet, tmp_path, content):
    (tmp_path / "broken.onnx").write_bytes(content)
    shown = micronet("check-onnx", tmp_path / "broken.onnx", "--json")
    assert shown.code == 2
    assert len(shown.err.strip().splitlines()) == 1


def test_a_classifier_that_returns_maps_is_checked_like_others(micronet, tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w"], ["y"], "layer"),
            helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_value_info("z", helper.make_sequence_type_proto(
            helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        ))],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[*OPSETS, helper.make_opsetid("ai.onnx.ml", 1)], ir_version=9)
    onnx.save(proto, tmp_path / "a.onnx")
    done = micronet("check-onnx", tmp_path / "a.onnx", "--json")
    assert done.code == 0 and done.json["integers"]["linear"]["all"] == 1, done.err
    assert [layer["name"] for layer in micronet("inspect", tmp_path / "a.onnx", "--json").json["layers"]] == ["layer"]


def test_the_command_is_found_in_the_help(micronet):
    assert "check-onnx" in micronet("--help").out
    assert micronet("check-onnx", "x.onnx", "--target", "tpu").code == 2


def test_findings_come_worst_first():
    graph = Graph()  # wide weights: a note; a float output: a warning; uint8 for TensorRT: an error
    x = graph.grid("x", np.uint8)
    found = lint(graph.model(graph.conv(x, weight=graph.weight(top=127))), "both")
    ranks = [("error", "warning", "note").index(finding.severity) for finding in found]
    assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2}


def max_pooled(*ops):
    """Return two quantized convolutions, each followed by these operators and a quantizer."""
    g = Graph()
    x = g.grid("x")
    for _ in range(2):
        x = g.conv(x)
        for op in ops:
            x = g.op(op, x, **({"kernel_shape": [2, 2]} if op == "MaxPool" else {}))
        x = g.grid(x)
    return g.model(x)


@x86_only
@pytest.mark.parametrize("ops", [("MaxPool",), ("Relu", "MaxPool"), ("MaxPool", "Relu")], ids="-".join)
def test_a_pooled_output_is_float_only_if_onnxruntime_runs_it_in_float(ops):
    proto = max_pooled(*ops)
    count = count_integer_layers(proto)["convolutions"]
    found = [finding for finding in lint(proto, "ort") if finding.rule == "float-output"]
    assert len(found) == count["all"] - count["integer"]


class Pooled(torch.nn.Module):
    """The README's LeNet with widths that are multiples of 8: pools come before the activations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 8, 5), torch.nn.Conv2d(8, 16, 5)
        self.fc1, self.fc2 = torch.nn.Linear(256, 48), torch.nn.Linear(48, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.dropout(F.relu(self.fc1(x.view(-1, 256))), training=self.training))


@x86_only
def test_a_network_that_pools_before_its_activations_runs_in_integers():
    images = torch.randn(16, 1, 28, 28)
    model, record = quantize_model(Pooled().eval(), QuantConfig())
    calibrate(model, [images])
    proto = to_onnx(Artifact(model.eval(), ModelSpec("lenet.py:Pooled"), [record]), images)
    assert {finding.rule for finding in lint(proto, "ort")} <= {"saturating-weights"}
    assert count_integer_layers(proto)["convolutions"] == {"integer": 2, "all": 2}
    worst = compare_layers(model, proto, images)
    assert len(worst) == 4 and max(worst.values()) <= 1


def test_every_cure_is_a_command_with_options_that_exist(micronet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    cures = {cure for rule in RULES for cure in (rule.cure, rule.foreign)} | set(CURES.values())
    shown = {command: micronet(command, "--help").out for cure in cures for command in COMMAND.findall(cure)}
    for cure in cures:
        commands = COMMAND.findall(cure)
        assert commands or cure in (STANDARD, NO_PRUNING)
        for option in re.findall(r"--[a-z0-9-]+", cure):
            assert any(re.search(rf"{option}\b", shown[command]) for command in commands), (cure, option)


def test_files_of_others_are_only_told_to_quantize_anew_or_to_change_the_network():
    """No option prunes an ONNX file, and none of an artifact's stages applies."""
    for rule in RULES:
        assert set(COMMAND.findall(rule.foreign)) <= {"quantize", "evaluate"}
        assert "quantize" not in rule.foreign or PTQ in rule.foreign


def test_layers_that_no_option_quantizes_are_not_told_to_be():
    def cures(proto, **about):
        note(proto, **about)
        return {finding.cure for finding in lint(proto, "ort") if finding.rule == "float-layers"}

    layer = next(node.name for node in float_weight(False).graph.node if node.op_type == "Conv")
    assert cures(float_weight(False)) == {PTQ}
    for reason in ("too small to benefit from integer arithmetic", *CURES):  # as quantize FILE.onnx left it
        assert cures(float_weight(False), left_float={layer: reason}) == set()
    exported = {"model": "nin", "history": [{"stage": "quantize"}]}
    assert cures(float_weight(False), left_float={layer: "destroyed"}, **exported) == set()
    for reason, cure in CURES.items():
        assert cures(float_weight(False), left_float={layer: reason}, **exported) == {cure}
    g = Graph()
    small = g.op("MatMul", g.op("Flatten", g.grid(g.conv(g.grid("x")))), g.put(np.ones((WIDTH * 64, 2), np.float32)))
    last = g.op("MatMul", small, g.put(np.ones((2, 4), np.float32)))
    assert [f.node for f in lint(g.model(last), "ort") if f.rule == "float-layers"] == [small]


@pytest.mark.parametrize("foreign", [True, False])
def test_a_file_is_not_told_to_be_made_by_the_command_that_made_it(foreign):
    for rule, target, severity, broken, _ in CASES:
        bad = onnx.ModelProto()
        bad.CopyFrom(broken)
        note(bad, left_float={}, **({} if foreign else {"model": "nin", "history": []}))
        cures = {(each.cure, each.severity) for each in lint(bad, target) if each.rule == rule}
        for cure, level in cures:
            assert not re.search(rf"{PTQ}(,|$)", cure), rule
            assert level == ("note" if cure.startswith("none: ") else severity), rule
        assert cures or rule == "float-layers"


def test_the_reason_why_a_join_of_a_quantized_file_stays_float_is_named():
    proto = joined("Add", False)
    note(proto, left_float={})
    [finding] = [each for each in lint(proto, "ort") if each.rule == "mixed-inputs"]
    assert finding.cure == "none: its input from Conv7 stays in float"


class Branches(torch.nn.Module):
    """A convolution read by SiLU, an addition and a concatenation of unlike branches, and Flatten before a layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.fc = torch.nn.Linear(16 * 16, 8)

    def forward(self, x):
        x = F.silu(self.conv1(x))
        x = F.max_pool2d(torch.cat([x + self.conv2(x), x], 1), 8)
        return self.fc(x.flatten(1))


def test_post_training_quantization_cures_what_its_rules_find():
    proto = to_onnx(Artifact(Branches().eval(), ModelSpec("mine.py:Branches")), torch.randn(2, 3, 32, 32))
    for node in proto.graph.node:
        if node.op_type == "Reshape":  # as other exporters write it
            node.CopyFrom(helper.make_node("Flatten", node.input[:1], node.output, node.name))
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)
    folded = posttraining.prepare(proto)
    ranges = posttraining.find_ranges(posttraining.collect(folded, [{"images": images}]), "minmax", 99.99)
    small = posttraining.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)
    cured = {rule.name for rule in RULES if rule.cure.startswith(PTQ)}
    assert cured == {"mixed-inputs", "float-output", "activation-scales", "flatten"}
    assert not cured & {finding.rule for finding in lint(small, "ort")}
