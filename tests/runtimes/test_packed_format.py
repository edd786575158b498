"""The packed format: integers at their own width, exact thresholds, and damaged files refused."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from micronet.errors import MicronetError
from micronet.packed.file_format import read
from micronet.packed.levels import find_levels, pack, packed_bytes, unpack
from micronet.packed.passes import threshold
from micronet.packed.program import Operation
from micronet.runtimes.packed.numpy_layers import conv_sums
from tests.runtimes.conftest import OLD_FILES


@given(
    st.integers(-1000, 1000), st.integers(1, 9), st.integers(1, 300),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=80),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_unpacking_gives_back_the_integers_bit_for_bit(offset, step, count, drawn):
    values = np.array([offset + step * (item % count) for item in drawn])
    levels = find_levels(values)
    data = pack(values, levels)
    assert data.size == packed_bytes(len(values), levels.number)
    np.testing.assert_array_equal(unpack(data, levels, values.shape), values)


@pytest.mark.parametrize(("values", "bits"), [([-1, 1], 1), ([-1, 0, 1], 1.6), ([-15, -13, 15], 4), ([-8, -7, 7], 4)])
def test_weights_are_as_wide_as_their_levels(values, bits):
    drawn = np.array(values * 400)
    assert pack(drawn, find_levels(drawn)).size == pytest.approx(drawn.size * bits / 8, abs=1)


@pytest.mark.parametrize("seed", range(40))
def test_sums_of_integers_are_those_of_torch(seed):
    draw = random.Random(seed)
    groups, kernel = draw.choice([1, 2, 4]), draw.choice([1, 3, 5])
    stride, pad, dilation = draw.choice([1, 2]), draw.choice([0, 1, 2]), draw.choice([1, 2])
    rng = np.random.default_rng(seed)
    highest = draw.choice([1, 255])
    x = rng.integers(-1 if highest == 1 else 0, highest, (2, 11, 12, 8), endpoint=True)
    weight = rng.integers(-draw.choice([1, 127]), 127, (12, 8 // groups, kernel, kernel), endpoint=True)
    attributes = {"group": groups, "stride": [stride] * 2, "pads": [pad] * 4, "dilation": [dilation] * 2}
    expected = F.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2).double(), torch.from_numpy(weight).double(), None,
                      stride, pad, dilation, groups)  # fmt: skip
    sums = conv_sums(x, Operation("conv", [0], attributes, weight.astype(np.int32)))
    np.testing.assert_array_equal(sums.astype(np.float64), expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_the_sign_of_the_scaled_sum(seed):
    rng = np.random.default_rng(seed)
    weight = rng.choice([-1, 1], (6, 4, 3, 3)).astype(np.int32)
    scale = rng.choice([-1, 1, 0.0], 6) * rng.random(6)
    bias = rng.choice([0.0, *rng.normal(size=5)], 6)
    conv = Operation("conv", [0], {"pads": [1] * 4}, weight, scale.astype(np.float32), bias.astype(np.float32))
    x = rng.choice([-1, 1], (2, 5, 5, 4)).astype(np.int8)
    exact = conv_sums(x, conv).astype(np.float64) * conv.scale.astype(np.float64) + conv.bias.astype(np.float64)
    made = threshold(conv, 1.0)
    np.testing.assert_array_equal(conv_sums(x, made) >= made.limits, exact >= 0)


def test_damaged_files_are_one_line(tmp_path):
    whole = (OLD_FILES / "wta8.packed").read_bytes()
    damaged = tmp_path / "x.packed"
    cases = [b"", whole[:100], whole[:-7], whole + b"x", b"\xff" * 200]
    header = int.from_bytes(whole[:8], "little")
    stored = json.loads(json.loads(whole[8 : 8 + header])["__metadata__"]["micronet-packed"])
    first, *rest = stored["operations"]
    for key, value in [
        ("format", 99), ("shape", [3, 32]), ("shape", [3, 0, 32]), ("operations", []), ("about", 3),
        ("operations", [{"op": "exec", "in": [0]}]), ("operations", [{"op": "relu", "in": [5]}]),
        ("operations", [{"op": "conv", "in": [0], "shape": [10**9, 10**9], "levels": [0, 1, 2]}]),
        ("operations", stored["operations"][:-6]), ("operations", [{**first, "stride": [0, 1]}, *rest]),
        ("operations", [{**first, "kernel": 3}, *rest]), ("operations", [{**first, "surprise": 1}, *rest]),
        ("operations", [{**first, "scale": None}, *rest]), ("operations", [{**first, "pads": [9**9] * 4}, *rest]),
        ("operations", [{"op": "relu", "in": []}]), ("operations", 7),
    ]:  # fmt: skip
        changed = json.loads(whole[8 : 8 + header])
        changed["__metadata__"] = {"micronet-packed": json.dumps({**stored, key: value})}
        text = json.dumps(changed)
        body = text.encode() + b" " * (-len(text) % 8)
        cases.append(len(body).to_bytes(8, "little") + body + whole[8 + header :])
    for data in cases:
        damaged.write_bytes(data)
        with pytest.raises(MicronetError, match=r"packed network|damaged|format"):
            read(damaged)
