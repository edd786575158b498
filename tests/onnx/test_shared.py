"""Networks that call a layer several times, read its weight elsewhere, or do more in training mode."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact
from micronet.errors import FailedError, MicronetError
from micronet.models.build import ModelSpec
from micronet.onnx.check import compare_outputs, require_agreement
from micronet.onnx.export import to_onnx
from micronet.onnx.growth import copied_bytes, repeated_bytes
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_integer_layers
from micronet.onnx.speed import without_quantizers
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model, restore
from micronet.quantization.quantize import TRAINING_ONLY, quantize_model
from micronet.runtimes.onnxruntime import EXACT_INT8

IMAGES = torch.randn(8, 3, 8, 8)
EXACT = onnxruntime.SessionOptions()
EXACT.add_session_config_entry(EXACT_INT8, "1")  # it replaces each stored weight, and none twice


class Twins(nn.Module):
    """Layers and a norm that are called twice, and a decoder with the encoder's weight and bias."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.own, self.last = nn.BatchNorm2d(8), nn.Linear(32, 16)

    def forward(self, x):
        code, seen = self.own(self.first(x)).relu(), 0
        for _ in range(2):
            code = self.norm(self.shared(code)).relu()
            seen = seen + self.last(F.max_pool2d(code, 2).flatten(1))
        decoded = F.conv_transpose2d(code, self.first.weight, None, 2, 1, 1)
        return decoded + self.first.bias.mean(), self.first.weight.norm(), seen


class Helped(nn.Module):
    """Branches, and a classifier that only helps in training."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.left, self.right, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        self.helper = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        scores = self.last(torch.cat([self.left(x).relu(), self.right(x).relu()], 1)).mean((2, 3))
        return {"scores": scores, "helper": self.helper(x.mean((2, 3)))} if self.training else {"scores": scores}


def trained(network):
    """Return a network whose batch norms have seen images, and shift and scale."""
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        network(IMAGES)
    return network.eval()


def quantized(network):
    model, record = quantize_model(trained(network), QuantConfig(), IMAGES)
    calibrate(model, [IMAGES])
    return Artifact(model.eval(), ModelSpec("mine.py:Mine"), [record])


def outputs_of(model):
    with torch.no_grad():
        found = model(IMAGES)
    return list(found.values()) if isinstance(found, dict) else list(found)


@pytest.mark.parametrize("kind", [Twins, Helped])
def test_files_compute_what_torch_computes_all_in_integers(kind):
    artifact = quantized(kind())
    proto = to_onnx(artifact, IMAGES)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), EXACT)
    for have, want in zip(session.run(None, {"images": IMAGES.numpy()}), outputs_of(artifact.model), strict=True):
        assert (torch.from_numpy(have) - want).norm() <= 0.05 * want.norm()
    counts = count_integer_layers(proto)
    helper = {"helper": TRAINING_ONLY} if kind is Helped else {}
    assert len(counts["float"]) == 1 and counts["float"].items() >= helper.items()  # or a transposed convolution
    integers = [tuple(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert [integers.count(shape) for shape in ((8, 8, 3, 3), (16, 32))] == [kind is Twins] * 2  # once, for two calls
    makers = {output: node for node in proto.graph.node for output in node.output}
    biases = [node.input[2] for node in proto.graph.node if node.op_type == "Conv" and node.input[1] in makers]
    repeated = repeated_bytes(without_quantizers(proto))
    assert (repeated >= 4 * 8 * 8 * 9) == (kind is Twins)  # it has a layer that is called twice
    assert len(biases) >= 3 and sum(bias in makers for bias in biases) >= 3  # in int32: no optimizer must make it so


def test_biases_that_are_rounded_for_each_call_of_a_layer_are_one_in_float():
    names = ("layers.1.Conv.bias.float", "layers.1.Conv.2.bias.float", "layers.2.Conv.bias.float", "equal")
    values = (1.0, 1.01, 2.0, 2.0)
    tensors = [
        numpy_helper.from_array(np.full(9, each, np.float32), name) for each, name in zip(values, names, strict=True)
    ]
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))
    assert copied_bytes(proto) == tensors[1].ByteSize() + tensors[3].ByteSize()


def test_wide_layers_that_are_called_often_are_stored_once_in_the_exact_mode_too():
    """Every layer of over 255 channels has the same zero points, whatever its weights are."""
    torch.manual_seed(0)
    shared = nn.Conv2d(300, 300, 1)
    artifact = quantized(nn.Sequential(nn.Conv2d(3, 300, 1), shared, shared, shared, nn.Conv2d(300, 300, 1)))
    proto = to_onnx(artifact, IMAGES)
    [have] = onnxruntime.InferenceSession(proto.SerializeToString(), EXACT).run(None, {"images": IMAGES.numpy()})
    [want] = [artifact.model(IMAGES).detach()]
    assert (torch.from_numpy(have) - want).norm() <= 0.05 * want.norm()
    weights = [each for each in proto.graph.initializer if list(each.dims) == [300, 300, 1, 1]]
    assert len(weights) == 2 and sum(node.op_type == "Reshape" for node in proto.graph.node) == 2


def test_a_linear_layer_of_sequences_that_is_called_twice_loads_in_the_exact_mode():
    """Torch stores its weight once, with one transpose for both calls."""
    shared = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(32, 4))
    artifact = quantized(model)
    proto = to_onnx(artifact, IMAGES)
    [have] = onnxruntime.InferenceSession(proto.SerializeToString(), EXACT).run(None, {"images": IMAGES.numpy()})
    want = artifact.model(IMAGES).detach()
    assert (torch.from_numpy(have) - want).norm() <= 0.05 * want.norm()
    assert sum(list(each.dims) == [32, 32] for each in proto.graph.initializer) == 1


def test_a_part_in_float_that_computes_something_else_is_an_error():
    """Every quantized layer agrees, but the decoder's weight is not the encoder's."""
    artifact = quantized(Twins())
    proto = to_onnx(artifact, IMAGES)
    require_agreement(artifact.model, proto, IMAGES, compare_outputs(artifact.model, proto, [IMAGES]))
    [decoder] = [node for node in proto.graph.node if node.op_type == "ConvTranspose"]
    [weight] = [tensor for tensor in proto.graph.initializer if tensor.name == decoder.input[1]]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    with pytest.raises(FailedError, match=r"differ by \d+.\d+% from the same integers"):
        require_agreement(artifact.model, proto, IMAGES, compare_outputs(artifact.model, proto, [IMAGES]))


def test_a_file_that_is_larger_than_in_float_says_so_first():
    found = {"convolutions": {"integer": 1, "all": 1}, "linear": {"integer": 0, "all": 0}, "float": {}}
    lines = describe({**found, "int8_ms": 1.0, "float_ms": 2.0, "int8_bytes": 2000, "float_bytes": 1900, "growth": "x"})
    assert lines[0].startswith("larger than in float: 2,000 bytes vs. 1,900; ") and len(lines) == 2


@pytest.mark.parametrize(("kind", "pairs"), [(Twins, [["shared", "norm"]]), (Helped, [["stem", "norm"]])])
def test_norms_fold_wherever_every_call_allows_it(kind, pairs):
    whole = trained(kind())
    folded, record = fold_model(whole, example=IMAGES[:2])
    assert record.result["pairs"] == pairs  # not "first", whose weight the decoder reads
    for mode in (False, True):
        whole.train(mode), folded.train(mode)
        for module in whole.modules():
            module.training &= not isinstance(module, nn.BatchNorm2d)
        for module in folded.modules():
            module.training &= not isinstance(module, nn.BatchNorm2d)
        torch.testing.assert_close(outputs_of(folded), outputs_of(whole), rtol=1e-4, atol=1e-5)
    again = restore(kind(), record).eval()
    again.load_state_dict(folded.state_dict())
    torch.testing.assert_close(outputs_of(again), outputs_of(folded.eval()))


def test_a_layer_that_is_called_twice_is_listed_once():
    with pytest.raises(
        MicronetError, match=r"unknown layer 'sared'; allowed: shared, first_weight_layer, last, first$"
    ):
        quantize_model(Twins(), QuantConfig(exclude="sared"), IMAGES)
