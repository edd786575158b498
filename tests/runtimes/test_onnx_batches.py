"""A batch of any size runs through a model of any batch size, and what does not fit is one line."""

import numpy as np
import pytest
from onnx import TensorProto

from micronet.errors import MicronetError
from micronet.onnx.sessions import run_feed
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import count_sample_macs, open_session, run
from tests.onnx.foreign import Net

DRAW = np.random.default_rng(0)
ROWS, IDS = DRAW.integers(-99, 99, (10, 16)).astype(np.float32), DRAW.integers(0, 8, (10, 8))  # exact in any order


def two_inputs(batch, kind=TensorProto.INT64):
    net = Net()
    embedded = net(
        "ReduceMean",
        net("Gather", np.arange(128, dtype=np.float32).reshape(8, 16), "ids", axis=0),
        axes=[1],
        keepdims=0,
    )
    out = net("Relu", net("Add", "x", embedded))
    model = net.model({"x": (TensorProto.FLOAT, [batch, 16]), "ids": (kind, [batch, 8])}, {out: 2})
    return open_session(model.SerializeToString(), RuntimeOptions(), "the model")


WANTED = run(two_inputs("n"), (ROWS, IDS))


@pytest.mark.parametrize("batch", [1, 4, 10, 16])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_a_fixed_batch_gives_what_a_free_one_gives(batch, kind):
    [found] = run(two_inputs(batch, kind), (ROWS, IDS))
    np.testing.assert_array_equal(found, WANTED[0])


def test_inputs_without_a_batch_get_one_entry_per_sample():
    """Such as the states of a recurrent layer, and a sampling rate."""
    net = Net()
    out = net("Mul", net("MatMul", net("Add", "x", "state"), np.eye(16, dtype=np.float32)), net("Cast", "rate", to=1))
    state, rate = (TensorProto.FLOAT, [1, 16]), (TensorProto.INT64, [])
    model = net.model({"x": (TensorProto.FLOAT, ["n", 16]), "state": state, "rate": rate}, {out: 2})
    session = open_session(model.SerializeToString(), RuntimeOptions(), "the model")
    states, rates = ROWS[::-1, None], np.arange(10)
    [found] = run(session, (ROWS, states, rates))
    np.testing.assert_array_equal(found, (ROWS + ROWS[::-1]) * rates[:, None])
    assert count_sample_macs(model, [(16,), (1, 16), ()]) == 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((ROWS, IDS.astype(np.float32)), "takes 2 inputs .*but the data set has float32 16, float32 8"),
        ((ROWS[:, :12], IDS), "takes 2 inputs .*but the data set has float32 12, int64 8"),
        (ROWS, "takes 2 inputs .*but the data set has float32 16"),
        ((ROWS, IDS + 8), "ONNX Runtime rejected float32 16, int64 8: indices element out of data bounds"),
    ],
)
def test_what_does_not_fit_is_one_line(given, message, capfd):
    with pytest.raises(MicronetError, match=message) as raised:
        run(two_inputs(4), given)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_a_size_that_onnx_runtime_refuses_is_named():
    with pytest.raises(MicronetError, match=r"input: x: axis 0 has 8 entries instead of 4$"):
        run_feed(two_inputs(4), {"x": ROWS[:8], "ids": IDS[:4]})
