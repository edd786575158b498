"""ONNX files that would exhaust memory or give nonsense: each is one line, and exit code 1 or 2."""

import resource

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

LARGE = 2**15
MAKERS = {  # a node of each, what it reads, and constants
    "ConstantOfShape": (["shape"], {}), "Pad": (["x", "pads"], {}), "RandomNormal": ([], {"shape": [LARGE, LARGE]}),
    "RandomUniformLike": (["tiled"], {}), "Resize": (["x", "", "factors"], {}),
    "OneHot": (["shape", "many", "pair"], {}), "Expand": (["x", "shape3"], {}),
    "EyeLike": (["tiled"], {}), "Range": (["zero", "many1", "one"], {}),
}  # fmt: skip
NUMBERS = {
    "shape": np.array([LARGE, LARGE]), "shape3": np.array([LARGE, LARGE, 4]), "pads": np.array([0, 0, LARGE, LARGE]),
    "factors": np.array([LARGE, LARGE], np.float32), "many": np.array([2**33]), "pair": np.array([0, 1], np.float32),
    "zero": np.array(0), "one": np.array(1), "many1": np.array(2**31), "repeats": np.array([LARGE, LARGE]),
}  # fmt: skip


def _onnx(path, nodes, numbers, functions=()):
    """Write an ONNX file whose input is x, (1, 4) float32, and whose output is y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, functions=functions), path)


def _in_a_branch(nodes, shape):
    """Return an If whose branches are ``nodes``, which compute ``sum``; it reads the constant ``true``."""
    branch = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("sum", TensorProto.FLOAT, shape)])
    return helper.make_node("If", ["true"], ["branched"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize("branched", [False, True], ids=["graph", "branch"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_value_of_four_gigabytes_is_refused_whatever_makes_it(micronet, tmp_path, maker, branched):
    inputs, attributes = MAKERS[maker]
    nodes = [
        helper.make_node("Tile", ["x", "repeats"], ["tiled"]) if "tiled" in inputs else None,
        helper.make_node(maker, inputs, ["large"], **attributes),
        helper.make_node("Cast", ["large"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["sum"], keepdims=0),
    ]
    nodes = [node for node in nodes if node is not None]
    if branched:
        nodes = [_in_a_branch(nodes, [])]
    nodes.append(helper.make_node("Add", ["x", "branched" if branched else "sum"], ["y"]))
    _onnx(tmp_path / "a.onnx", nodes, {**NUMBERS, "true": np.array(True)})
    done = micronet("check-onnx", tmp_path / "a.onnx")
    assert (done.code, "2 GiB" in done.err) == (2, True), done.err


def _doubling(path):
    """A vector that 24 nodes double: each number of it would be kept while shapes are inferred."""
    nodes = [helper.make_node("Concat", [f"s{each}", f"s{each}"], [f"s{each + 1}"], axis=0) for each in range(24)]
    last = [helper.make_node("Cast", ["s24"], ["cast"], to=1), helper.make_node("ReduceMax", ["cast"], ["most"])]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Unsqueeze", ["shape", "one"], ["s0"]),
        *nodes,
        *last,
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    _onnx(path, nodes, {"one": np.array([1])})


def _functions(path):
    """Forty functions that call the next one twice: a trillion nodes."""
    functions = []
    for each in range(40):
        calls = [("x", "m"), ("m", "y")]
        nodes = [helper.make_node(f"f{each + 1}", [given], [made], domain="d") for given, made in calls]
        nodes = nodes if each < 39 else [helper.make_node("Relu", ["x"], ["y"])]
        functions.append(_function(f"f{each}", nodes))
    _onnx(path, [helper.make_node("f0", ["x"], ["y"], domain="d")], {}, functions)


def _function(name, nodes):
    return helper.make_function(
        "d", name, ["x"], ["y"], nodes, [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    )


@pytest.mark.parametrize(("make", "message"), [(_doubling, ""), (_functions, "functions expand")])
def test_onnx_files_that_grow_with_every_node_take_little_memory(micronet, tmp_path, make, message):
    make(tmp_path / "a.onnx")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = micronet("verify", tmp_path / "a.onnx")
    assert (done.code, message in done.err) == (2 if message else 0, True), done.err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def _packed(path):
    """Weights of four bits, two in a byte, in another file."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["sum"]),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    _onnx(path, nodes, {"scale": np.array(1, np.float32)})
    model = onnx.load(path)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 21))
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [1, 3], bytes(2), raw=True))
    onnx.save(model, path, save_as_external_data=True, location="a.bin", size_threshold=0)


def _long_range(path):
    nodes = [helper.make_node("Range", ["zero", "many", "one"], ["r"]), helper.make_node("Cast", ["r"], ["c"], to=1)]
    nodes += [helper.make_node("ReduceMax", ["c"], ["most"]), helper.make_node("Add", ["x", "most"], ["y"])]
    _onnx(path, nodes, {"zero": np.array(0), "many": np.array(2_000_000), "one": np.array(1)})


def _same_names(path):
    """Two functions, each with a c: -infinity that is added, and a number that is multiplied."""
    mask = onnx.numpy_helper.from_array(np.array([0, 0, 0, -np.inf], np.float32))
    masking = [helper.make_node("Constant", [], ["c"], value=mask), helper.make_node("Add", ["x", "c"], ["y"])]
    squaring = [helper.make_node("Transpose", ["x"], ["c"]), helper.make_node("MatMul", ["x", "c"], ["y"])]
    nodes = [helper.make_node("mask", ["x"], ["m"], domain="d"), helper.make_node("square", ["m"], ["y"], domain="d")]
    _onnx(path, nodes, {}, [_function("mask", masking), _function("square", squaring)])


@pytest.mark.parametrize("make", [_packed, _long_range, _same_names])
def test_onnx_files_that_only_look_hostile_are_read(micronet, tmp_path, make):
    make(tmp_path / "a.onnx")
    done = micronet("verify", tmp_path / "a.onnx")
    assert done.code == 0, done.err


NAN, INF = np.float32("nan"), np.float32("inf")


@pytest.mark.parametrize(
    ("operator", "value", "code"),
    [
        *(("MatMul", value, 1) for value in (NAN, INF, -INF)), ("Add", NAN, 1), ("Add", -INF, 0), ("Mul", -INF, 0),
        ("Add", INF, 0), ("Equal", NAN, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_nan_and_multiplied_infinity_of_onnx_files_are_failures(micronet, tmp_path, operator, value, code, place):
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = value
    numbers = {"true": np.array(True)}
    constant = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight))
    moved = helper.make_node("Transpose", ["w"], ["moved"])
    if place == "initializer":
        nodes, numbers["w"] = [moved], weight
    else:
        nodes = [constant, moved]
    nodes.append(helper.make_node(operator, ["x", "moved"], ["sum"]))
    if operator == "Equal":  # as in Where(Equal(x, nan), ...)
        nodes[-1].output[0] = "equal"
        nodes.append(helper.make_node("Cast", ["equal"], ["sum"], to=TensorProto.FLOAT))
    if place == "branch":
        nodes = [_in_a_branch(nodes, ["rows", "columns"]), helper.make_node("Identity", ["branched"], ["y"])]
    else:
        nodes[-1].output[0] = "y"
    _onnx(tmp_path / "a.onnx", nodes, numbers)
    done = micronet("verify", tmp_path / "a.onnx")
    assert done.code == code, done.err
    assert code == 0 or ("in w" in done.err)


@pytest.mark.parametrize(
    ("kind", "values", "code"),
    [
        ("DequantizeLinear", -1, 1), ("DequantizeLinear", 0, 0), ("QuantizeLinear", 0, 1),
        ("BatchNormalization", -1, 1), ("BatchNormalization", 0, 0),
    ],
)  # fmt: skip
def test_scales_and_variances_of_onnx_files_are_not_negative(micronet, tmp_path, kind, values, code):
    numbers = {
        "one": np.ones(4, np.float32), "tested": np.full(4, values, np.float32), "q": np.ones(4, np.int8),
        "zero": np.zeros(4, np.int8),
    }  # fmt: skip
    if kind == "BatchNormalization":
        nodes = [helper.make_node(kind, ["x", "one", "one", "one", "tested"], ["y"])]
    else:
        inputs = ["q", "tested", "zero"] if kind == "DequantizeLinear" else ["one", "tested", "zero"]
        nodes = [helper.make_node(kind, inputs, ["out"], axis=0)]
        nodes.append(helper.make_node("Cast", ["out"], ["cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Add", ["x", "cast"], ["y"]))
    _onnx(tmp_path / "a.onnx", nodes, numbers)
    done = micronet("verify", tmp_path / "a.onnx")
    assert (done.code, code == 0 or "tested" in done.err) == (code, True), done.err
