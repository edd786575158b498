"""Operations in ncnn that a network rarely has, against numpy: exact where nothing is rounded."""

import numpy as np
import pytest

from micronet.packed.program import Operation, Program
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.ncnn.files import write_ncnn
from micronet.runtimes.ncnn.predictor import NcnnPredictor
from micronet.runtimes.packed.numpy_backend import run

pytest.importorskip("ncnn", reason="needs ncnn")
SHAPE = [16, 6, 8]
LIMITS = np.zeros(8, np.int32)
SIGNS = np.random.default_rng(0).choice([-1, 1], (8, 16, 1, 1)).astype(np.int32)


def op(kind, *inputs, **attributes):
    return Operation(kind, list(inputs) or [0], attributes)


def resize(source, size, factors, coordinates, **nearest):
    return op("resize", source, size=size, factors=factors, coordinates=coordinates, **nearest)


def slices(*begin):
    return op("slice", begin=list(begin), extent=[16, 3, 4], stride=[2, 2])


ONLY_MOVE = {
    "every second pixel": [slices(0, 1, 0), slices(0, 0, 1), op("concat", 1, 2)],
    "cropped blocks": [op("depth_to_space", block=[2, 2], crop=[1, 0, 2, 1])],
    "padded": [op("pad", pads=[1, 2, 0, 3])],
    "beyond counted pads": [
        op("average_pool", kernel=[3, 3], stride=[2, 2], pads=[1, 1, 1, 1], extra=[1, 1], count_pads=True)
    ],
    "beyond the map": [op("average_pool", kernel=[3, 3], stride=[2, 2], extra=[1, 0])],
    "nearest": [resize(0, [12, 24], [2.0, 3.0], "asymmetric", nearest="floor")],
    "nearest, odd": [resize(0, [7, 11], [7 / 6, 11 / 8], "asymmetric", nearest="floor")],
    "nearest, smaller": [resize(0, [3, 4], [0.5, 0.5], "asymmetric", nearest="floor")],
    "bilinear": [resize(0, [7, 13], [7 / 6, 13 / 8], "pytorch_half_pixel")],
    "bilinear, smaller": [resize(0, [3, 3], [0.5, 3 / 8], "half_pixel")],
    "bilinear, aligned": [resize(0, [11, 5], [11 / 6, 5 / 8], "align_corners")],
    "bilinear, of a pixel": [op("mean", keep=True), resize(1, [4, 5], [4.0, 5.0], "half_pixel")],
    "bilinear, of a row": [op("max_pool", kernel=[6, 1]), resize(1, [4, 16], [4.0, 2.0], "half_pixel")],
    "a gate": [op("mean"), op("unflatten", 1), op("hard_sigmoid", 2, alpha=1 / 6, beta=0.5), op("mul", 0, 3)],
    "functions": [
        op("elu", alpha=1.0), op("leaky_relu", 1, alpha=0.2), op("mish", 2), op("silu", 3), op("gelu", 4),
        op("tanh_gelu", 5), op("tanh", 6), op("sigmoid", 7),
    ],
    "signs side by side": [
        op("sign"), Operation("threshold", [1], {}, SIGNS, limits=LIMITS), op("flatten", 2), op("sign"),
        op("flatten", 4), op("concat", 3, 5),
    ],
    "unsigned integers between floats": [op("quantize", scale=0.05, zero_point=7, range=[0, 255]), op("add", 1, 0)],
    "16 bits between floats": [op("quantize", scale=1e-4, zero_point=32768, range=[0, 65535]), op("mul", 1, 0)],
}  # fmt: skip


@pytest.mark.parametrize("name", ONLY_MOVE)
def test_an_operation_computes_what_numpy_computes(name, tmp_path):
    images = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    program = Program(ONLY_MOVE[name], SHAPE, {})
    found = NcnnPredictor(tmp_path, write_ncnn(program, tmp_path), RuntimeOptions(threads=1))(images)
    # Eight functions at most, whose exponentials are exact to 1e-6.
    np.testing.assert_allclose(found, run(program, images), atol=1e-5)


def test_outputs_may_be_inputs_of_other_layers_and_occur_twice(tmp_path):
    images = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    program = Program([op("relu"), op("max_pool", 1, kernel=[2, 2])], SHAPE, {}, [1, 2, 0, 1])
    found = NcnnPredictor(tmp_path, write_ncnn(program, tmp_path), RuntimeOptions(threads=1))(images)
    for ours, theirs in zip(run(program, images), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
