"""Raw inputs and images for ONNX files."""

import re

import numpy as np
import onnx
import pytest
from PIL import Image

from micronet.errors import MicronetError
from micronet.onnx.feeds import ImageInput, Input, image_size, inputs_of, is_channels_last
from micronet.stages.onnx_files import compare_files, raw_feeds
from tests.onnx.foreign import IMAGE, NETWORKS, Net, inputs_for

F32, I64 = np.dtype("float32"), np.dtype("int64")
TOKENS, MASK = Input("tokens", F32, (None, 6, 32)), Input("mask", np.dtype(bool), (None, 1, 6))
WAVE, RATE, STATE = Input("wave", F32, (1, 1, 64)), Input("rate", I64, ()), Input("state", F32, (2, None, 8))
ROWS, HIDDEN = Input("x", F32, (None, 3)), Input("h", F32, (1, 1, 8))


def saved(path, arrays):
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


@pytest.mark.parametrize(
    ("inputs", "arrays", "runs"),
    [
        ([TOKENS], {"other": np.ones((3, 6, 32), F32)}, [(3, 6, 32)]),
        ([TOKENS], {"tokens": np.ones((65, 6, 32), np.float64)}, [(64, 6, 32), (1, 6, 32)]),
        ([TOKENS, MASK], {"mask": np.ones((2, 1, 6), bool), "tokens": np.ones((2, 6, 32), F32)}, [(2, 6, 32)]),
        ([WAVE, RATE], {"a": np.ones((3, 1, 64), F32), "b": np.array(16000)}, [(1, 1, 64)] * 3),
        ([STATE, RATE], {"a": np.ones((4, 2, 1, 8), F32), "b": np.array([8, 8, 16, 16])}, [(2, 1, 8)] * 4),
        ([STATE, RATE], {"a": np.ones((4, 2, 1, 8), F32), "b": np.array(16)}, [(2, 1, 8)] * 4),
        ([ROWS, HIDDEN], {"x": np.ones((4, 3), F32), "h": np.ones((4, 1, 8), F32)}, [(1, 3)] * 4),
        ([ROWS, HIDDEN], {"x": np.ones((4, 3), F32), "h": np.ones((4, 1, 1, 8), F32)}, [(1, 3)] * 4),
        ([ROWS, HIDDEN], {"x": np.ones((4, 3), F32), "h": np.ones((1, 1, 8), F32)}, [(4, 3)]),
        (
            [Input("x", F32, (1, 3)), STATE],
            {"x": np.ones((4, 3), F32), "state": np.ones((4, 2, 1, 8), F32)},
            [(1, 3)] * 4,
        ),
        ([Input("x", F32, (2, 3))], {"x": np.arange(9, dtype=F32).reshape(3, 3)}, [(2, 3)] * 2),
        (
            [TOKENS, Input("w", F32, (5, 7))],
            {"tokens": np.ones((65, 6, 32), F32), "w": np.full((5, 7), -np.inf, F32)},
            [(64, 6, 32), (1, 6, 32)],
        ),
        (
            [TOKENS, MASK],
            {"tokens": np.ones((65, 6, 32), F32), "mask": np.ones((1, 1, 6), bool)},
            [(64, 6, 32), (1, 6, 32)],
        ),
    ],
)
def test_arrays_become_runs(tmp_path, inputs, arrays, runs):
    feeds = raw_feeds(str(saved(tmp_path, arrays)), inputs)
    assert [feed[inputs[0].name].shape for feed in feeds] == runs
    for feed in feeds:
        assert [feed[entry.name].dtype for entry in inputs] == [entry.dtype for entry in inputs]
        assert [feed[entry.name].ndim for entry in inputs] == [len(entry.shape) for entry in inputs]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": (3, 6, 32)}, "it has no array for mask bool (?, 1, 6); save one array for each input"),
        ({"tokens": (3, 6, 32), "mask": (3, 1, 6), "z": (3,)}, "the model has no input z; save one"),
        (
            {"a": (3, 6, 31), "b": (3, 1, 6)},
            "a has shape (3, 6, 31), but the model takes (?, 6, 32); save it as (samples, 6, 32)",
        ),
        ({"tokens": (3, 6), "mask": (0, 1, 6)}, "mask has shape (0, 1, 6), so it is empty"),
        ({"tokens": (100, 6, 32), "mask": (99, 1, 6)}, "tokens has 100, mask has 99; save as many in each"),
        ({"tokens": (3, 2, 6, 32), "mask": (4, 2, 1, 6)}, "tokens has 3, mask has 4"),
    ],
    ids=["missing", "extra", "size", "empty", "lengths", "runs"],
)
def test_each_array_that_does_not_fit_is_named_with_its_fault(tmp_path, arrays, message):
    types = dict(zip(arrays, (F32, bool, F32), strict=False))
    path = saved(tmp_path, {name: np.ones(shape, types[name]) for name, shape in arrays.items()})
    with pytest.raises(MicronetError, match=re.escape(message)):
        raw_feeds(str(path), [TOKENS, MASK])


def test_batches_of_unequal_numbers_are_named(tmp_path):
    path = saved(tmp_path, {"x": np.ones((100, 3), F32), "y": np.ones((100, 3), F32)})
    with pytest.raises(MicronetError, match=r"runs \(50 of x, 20 of y\); save them with one more axis"):
        raw_feeds(str(path), [Input("x", F32, (2, 3)), Input("y", F32, (5, 3))])


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(np.nan, F32, "NaN"), (np.inf, F32, "infinity"), (7, np.uint8, "is uint8; save it as float32")],
)
def test_values_that_no_image_has_are_refused_before_anything_is_said(micronet, tmp_path, value, dtype, message):
    onnx.save(NETWORKS["channels-last"](), tmp_path / "net.onnx")
    images = np.ones((2, 16, 16, 3), dtype)
    images[1, 2, 3, 0] = value
    done = micronet("quantize", tmp_path / "net.onnx", "--mode", "ptq", "--calib-data", saved(tmp_path, {"a": images}))
    assert done.code == 2 and done.err.startswith(f"error: {tmp_path / 'x.npz'}: a ") and message in done.err


def test_images_are_placed_and_normalized_as_asked(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    entry = Input("x", F32, (None, None, None, 3))
    assert is_channels_last(entry, "auto") and not is_channels_last(entry, "nchw")
    size = image_size(entry, (3, 4, 6), channels_last=True)
    [feed] = ImageInput(entry, size, True, [0.5, 0.25, 0.0], [0.5, 1.0, 2.0]).read([tmp_path / "a.png"])
    expected = (pixels[None] / F32.type(255) - np.array([0.5, 0.25, 0], F32)) / np.array([0.5, 1, 2], F32)
    assert np.allclose(feed["x"], expected, atol=1e-6)
    [raw] = ImageInput(Input("x", np.dtype("uint8"), (1, 3, 4, 6)), size).read([tmp_path / "a.png"])
    assert np.array_equal(raw["x"], pixels.transpose(2, 0, 1)[None])


def test_sizes_that_are_open_or_contradict_are_refused():
    with pytest.raises(MicronetError, match="pass it with --input-shape 3,HEIGHT,WIDTH"):
        image_size(Input("x", F32, (1, 3, None, None)), None, channels_last=False)
    with pytest.raises(MicronetError, match="--input-shape is 3,8,8, but the model takes"):
        image_size(Input("x", F32, (1, 3, 16, 16)), (3, 8, 8), channels_last=False)
    with pytest.raises(MicronetError, match="has 12 channels"):
        image_size(Input("x", F32, (1, 12, 16, 16)), None, channels_last=False)


def test_the_command_takes_several_inputs_without_labels(micronet, tmp_path):
    proto = NETWORKS["attention"]()
    onnx.save(proto, tmp_path / "net.onnx")
    feeds = inputs_for(proto)
    data = saved(tmp_path, {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
    done = micronet("quantize", tmp_path / "net.onnx", "--mode", "ptq", "--calib-data", data, "--skip-timing", "--json")
    assert done.code == 0, done.err
    assert done.json["test_sqnr_db"] > 20 and done.json["test_images"] == 8
    assert done.json["tested_on"] == "also used for calibration"
    assert done.json["integers"]["linear"] == {"integer": 5, "all": 5} and done.json["integers"]["products"] == 2
    assert (tmp_path / "net-int8.onnx").exists()


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "in the output"])
def test_infinities_within_a_model_are_cached_and_nan_in_its_outputs_is_a_failure(micronet, tmp_path, hidden):
    net = Net()
    logarithms = net("Log", net("Relu", net.conv("x", 3, 8)))
    pooled = net("MaxPool", logarithms, kernel_shape=[1, 1])  # ONNX Runtime turns -inf into the least float32
    sums = net("Conv", pooled, np.abs(net.weight(8, 8, 1, 1))) if hidden else net.conv(logarithms, 8, 8)
    outputs = {net("Sigmoid", sums) if hidden else sums: 4, net.conv(net("Exp", logarithms), 8, 4): 4}
    onnx.save(net.model(IMAGE, outputs), tmp_path / "net.onnx")
    data = saved(tmp_path, {"x": np.random.default_rng(0).standard_normal((4, 3, 16, 16), F32)})
    for word in ("wrote", "read activation statistics from"):
        done = micronet("quantize", tmp_path / "net.onnx", "--mode", "ptq", "--calib-data", data, "--skip-timing",
                        "--calib-cache", tmp_path / "cache", "--force")  # fmt: skip
        assert f"{word} {tmp_path / 'cache'}" in done.err
        assert done.code == (0 if hidden else 1), done.err
        assert ("the float model computes NaN or infinity" in done.err) != hidden
        assert (tmp_path / "net-int8.onnx").exists() == hidden


def test_the_command_takes_a_folder_of_images_and_says_what_is_missing(micronet, tmp_path):
    onnx.save(NETWORKS["channels-last"](), tmp_path / "net.onnx")
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "a.png")
    common = ["quantize", tmp_path / "net.onnx", "--mode", "ptq", "--skip-timing"]
    done = micronet(*common, "--calib-data", tmp_path, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--json")
    assert done.code == 0 and len(done.json["left_float"]) == 0, done.err
    for options, message in (
        ([], "specify one with --data, or calibration inputs with --calib-data"),
        (["--calib-data", tmp_path / "none"], "neither a folder of images nor an .npz file"),
        (["--calib-data", saved(tmp_path, {"x": np.ones((1, 16, 16, 3), F32)}), "--layout", "nhwc"], "raw inputs"),
        (["--mean", "0.5,0.5,0.5"], "must be used together"),
    ):
        refused = micronet(*common, "--force", *options)
        assert refused.code == 2 and message in refused.err and len(refused.err.strip().splitlines()) == 1


def test_an_input_without_a_type_is_refused():
    proto = NETWORKS["channels-last"]()
    proto.graph.input[0].type.tensor_type.ClearField("elem_type")
    with pytest.raises(MicronetError, match=r"input \w+ is not a tensor of a known type"):
        inputs_of(proto)


def test_inputs_that_a_file_cannot_run_on_are_named():
    f32 = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, f32, ["batch", "length"]) for name in ("x", "y", "sum")]
    node = onnx.helper.make_node("Add", ["x", "y"], ["sum"])
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    feed = {"x": np.ones((2, 5), F32), "y": np.ones((2, 4), F32)}
    with pytest.raises(MicronetError, match=r"rejected the inputs x \(2, 5\), y \(2, 4\)"):
        compare_files(proto, proto, [feed])
