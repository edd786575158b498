"""Torch and ONNX Runtime agree, for every scheme on every kind of network: classes, and every layer within one step.

Images: the UCI digits; the networks know most, or their scores would lie too close for "same class".
`pytest -m slow tests/onnx/test_agreement.py` runs all pairs on 1,000 images; CI runs some, on 300, and
`test_foreign_networks_go_the_whole_way` the export of a mobilenet_v2, which checks the same.
"""

import json

import onnx
import pytest

from micronet.artifact.artifact import load
from micronet.cli.app import run
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.data.load import load_data
from micronet.data.split import random_subset
from micronet.onnx.check import compare_outputs
from micronet.onnx.layer_agreement import compare_layers
from scripts.export_zoo import schemes

# Of mobilenet_v2, one of each kind of block, without and with a sum: expansion, channels, repeats, stride.
SMALL = json.dumps({"width_mult": 0.5, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]})
NETWORKS = {
    "nin": ["--model", "nin", "--width", "0.1"],
    "nin_gc": ["--model", "nin_gc", "--width", "0.1"],
    "resnet18": ["--model", "resnet18", "--width", "0.1"],
    "mobilenet_v2": ["--model", "torchvision:mobilenet_v2", "--model-args", SMALL],
}
SCHEMES = schemes(320)
IN_CI = {("nin", "W8A8 asym layer"), ("nin", "W1A1"), ("nin", "LSQ W4A4")}
IMAGES, CHUNK = 1000, 100  # images; images per batch, the first of which is compared layer by layer
PAIRS = [
    pytest.param(
        network,
        scheme,
        marks=[] if (network, scheme) in IN_CI else pytest.mark.slow,
        id=f"{network}-{scheme}".replace(" ", "-"),
    )
    for network in NETWORKS
    for scheme in SCHEMES
]


@pytest.mark.parametrize(("network", "scheme"), PAIRS)
def test_torch_and_onnxruntime_agree(network, scheme, shared, tmp_path):
    images = 300 if (network, scheme) in IN_CI else IMAGES

    def train(folder):
        output = ["-o", folder / "float.safetensors", "--quiet"]
        assert run([*map(str, ["train", *NETWORKS[network], "--limit", "320", "--epochs", "5", *output])]) == 0

    source = shared(f"trained-{network}", train) / "float.safetensors"
    steps = [["bn-fuse", source, "-o", tmp_path / "fused.safetensors"]]
    if SCHEMES[scheme] is not None:
        steps = [
            ["quantize", source, *SCHEMES[scheme], "-o", tmp_path / "q.safetensors"],
            ["bn-fuse", tmp_path / "q.safetensors", "-o", tmp_path / "fused.safetensors"],
        ]
    steps.append(["export-onnx", tmp_path / "fused.safetensors", "-o", tmp_path / "x.onnx"])
    for step in steps:
        assert run([*map(str, step), "--quiet"]) == 0
    artifact, proto = load(tmp_path / "fused.safetensors"), onnx.load(tmp_path / "x.onnx")
    data = load_data(None, like=DataSpec(**{**artifact.data, "limit": None}))
    batches = [batch for batch, _ in eval_batches(random_subset(data.train, images, 1), data.spec, CHUNK)]
    assert compare_outputs(artifact.model, proto, batches).classes >= 0.999
    assert max(compare_layers(artifact.model, proto, batches[0]).values(), default=0) <= 1
