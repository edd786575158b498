"""Networks that do more in training mode, such as those with an auxiliary classifier, are quantized like others."""

import copy
from collections import Counter

import pytest
import torch
from onnxruntime import GraphOptimizationLevel
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.graph.trace import trace, trace_both
from micronet.quantization.calibrate import calibrate, each_quantizer
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import TRAINING_ONLY, quantize_model, restore
from micronet.runtimes.onnxruntime import optimize

IMAGES = torch.rand(2, 3, 8, 8)


class Auxiliary(nn.Module):
    """A residual add, a concatenation, and a classifier for training between them, whose ReLUs shift all names."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.aux, self.head, self.fc = nn.Linear(4, 5), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.left(x))
        if self.training:
            aux = self.aux(F.dropout(F.relu(x.mean((2, 3))), 0.5, training=self.training))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = self.fc(F.dropout(F.relu(self.head(x)).mean((2, 3)), 0.1, training=self.training))
        return (x, aux) if self.training else x


class Otherwise(Auxiliary):
    """Training mode leaves out what eval mode does."""

    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x).softmax(1)


def quantized(kind=Auxiliary):
    torch.manual_seed(0)
    model = kind().eval()
    made, record = quantize_model(model, QuantConfig(), IMAGES)
    calibrate(made, [IMAGES])
    return model, made.eval(), record


def applied(model):
    """Return the modules whose quantizers a forward applies, in the order of ``each_quantizer``."""
    seen = set()
    handles = [
        quantizer.register_forward_hook(lambda *_, key=(name, slot): seen.add(key))
        for name, slot, quantizer in each_quantizer(model)
    ]
    model(IMAGES)
    for handle in handles:
        handle.remove()
    return [name for name, slot, _ in each_quantizer(model) if (name, slot) in seen]


def test_adds_and_concatenations_are_quantized_in_both_modes():
    model, made, record = quantized()
    assert {"relu_tap", "left_tap"} <= record.result["quantizers"].keys()
    assert record.result["left_float"] == {"aux": TRAINING_ONLY}
    assert made.state_dict().keys() >= model.state_dict().keys()
    assert (made(IMAGES) - model(IMAGES)).norm() < 0.05 * model(IMAGES).norm()
    scores, aux = made.train()(IMAGES)
    (scores.sum() + aux.sum()).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert applied(made.train()) == applied(made.eval()) == [name for name, _, _ in each_quantizer(made)]


def test_such_a_network_is_rebuilt_copied_and_traced_again():
    model, made, record = quantized()
    again = restore(copy.deepcopy(model), record)
    again.load_state_dict(made.state_dict())
    for each in (again, copy.deepcopy(made)):
        assert torch.equal(each.eval()(IMAGES), made.eval()(IMAGES))
    assert trace_both(made, IMAGES).fx.find_nodes(op="call_module", target="relu_tap")


@pytest.mark.slow
def test_all_of_it_runs_in_integers():
    made = micronet.quantize(Auxiliary().eval(), data=[IMAGES], mode="ptq")
    file = micronet.export_onnx(made, IMAGES).SerializeToString()
    kinds = Counter(node.op_type for node in optimize(file, GraphOptimizationLevel.ORT_ENABLE_ALL).graph.node)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QLinearConcat"], kinds["QGemm"]) == (5, 1, 1, 1)
    assert not kinds.keys() & {"Conv", "Add", "Concat", "Gemm"}


def test_a_network_that_leaves_something_out_in_training_mode_is_not_traced_in_both():
    assert trace(Otherwise(), IMAGES) is None
    assert trace_both(Otherwise(), IMAGES) is None
    quantized(Otherwise)
