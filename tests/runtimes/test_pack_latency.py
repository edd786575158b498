"""``pack`` says how fast a packed network is, and the network that it is compared with is the float one."""

import re

import numpy as np
import onnx
import pytest

from micronet.onnx.export import to_onnx
from micronet.onnx.speed import without_quantizers
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.stages import export
from micronet.stages.pack_latency import describe, measure_packed
from tests.onnx.test_onnx import IMAGES, quantized


def test_the_network_in_float_has_no_quantizers_and_nearly_the_same_outputs():
    proto = to_onnx(quantized("nin", {"width": 0.1}), IMAGES)
    plain = without_quantizers(proto)
    onnx.checker.check_model(plain)
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    ours, theirs = (session_predictor(each.SerializeToString(), RuntimeOptions())(IMAGES.numpy())
                    for each in (plain, proto))  # fmt: skip
    assert 0 < np.linalg.norm(ours - theirs) < 0.5 * np.linalg.norm(theirs)
    found = measure_packed(pack_model(proto), proto, IMAGES[:1].numpy())
    assert found["layers"] == 9 and found["float_layers"] == 0 and min(found["packed_ms"], found["onnx_ms"]) > 0


@pytest.mark.parametrize(
    ("changes", "slower", "words"),
    [
        ({"packed_ms": 0.5}, False, "0.50 ms vs. 2.00 ms in float and 1.00 ms quantized in ONNX Runtime"),
        ({"packed_ms": 1.04}, False, "1.04 ms vs."),  # within the noise
        ({"packed_ms": 1.5}, True, "slower than the quantized network: .*export-onnx"),
        ({"onnx_float_ms": 0.5, "float_layers": 2}, True, "slower than the float network: .*2 of its 3 layers"),
        ({"onnx_ms": None, "packed_ms": 9, "kernel": "numpy (pip install numba)"}, True, "pip install numba"),
    ],
)
def test_a_slower_network_is_said_to_be_so(changes, slower, words):
    found = {"packed_ms": 1.0, "onnx_float_ms": 2.0, "onnx_ms": 1.0, "kernel": "avx2", "layers": 3, "float_layers": 0}
    says, line = describe(found | changes)
    assert says == slower
    assert re.search(words, line)


def test_pack_reports_the_speed(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_TIMED", 10**9)
    done = micronet("pack", chain / "fused.safetensors", "-o", tmp_path / "x.packed")
    assert done.code == 0 and "ms in float" in done.out
    assert (
        "ms in float"
        not in micronet("pack", chain / "fused.safetensors", "-o", tmp_path / "y.packed", "--skip-timing").out
    )
