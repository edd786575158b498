"""Recurrent layers become ONNX's own operators, which compute the same."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch._decomp import decompositions

import micronet


class Recurrent(nn.Module):
    def __init__(self, layer, *, given):
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x):
        layer = self.layer
        batch, directions = x.shape[0 if layer.batch_first else 1], 1 + layer.bidirectional
        h = torch.linspace(-1, 1, layer.hidden_size).expand(directions * layer.num_layers, batch, layer.hidden_size)
        state = (h, h * 2) if isinstance(layer, nn.LSTM) else h
        return layer(x, state) if self.given else layer(x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, True),
        ({"bias": False, "batch_first": True}, False),
    ],
)
def test_recurrent_layers_are_single_operators(kind, options, given, monkeypatch):
    options = options | ({"nonlinearity": "relu"} if kind is nn.RNN and given else {})
    torch.manual_seed(0)
    net = Recurrent(kind(2, 3, **options), given=given).eval()
    x = torch.randn(2, 4, 2)
    for loop in ("one_layer_rnn", "one_layer_lstm", "mkldnn_one_layer_lstm"):
        monkeypatch.setattr(decompositions, loop, lambda *_, **__: pytest.fail("it walks through the steps"))
    proto = micronet.export_onnx(net, x, skip_timing=True)
    assert sum(node.op_type == kind.__name__ for node in proto.graph.node) == options.get("num_layers", 1)
    assert len(proto.graph.node) < 80
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    assert session.get_inputs()[0].shape == ["batch", 4, 2]
    for batch in (x[:1], torch.randn(5, 4, 2)):
        found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            y, states = net(batch)
        expected = [y, *(states if isinstance(states, tuple) else (states,))]
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=4 * 3 * 2**-22)  # rounding, over steps and products


class Reading(nn.Module):
    """Reads the columns of an image, two at a time, as a network for lines of text."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.layer = nn.Conv2d(1, 2, (8, 3), padding=(0, 1)), nn.MaxPool2d((1, 2)), nn.LSTM(2, 3)

    def forward(self, x):
        return self.layer(self.pool(self.conv(x)).squeeze(2).permute(2, 0, 1))[0]


def test_the_width_that_a_recurrent_layer_walks_along_may_be_free():
    net = Reading().eval()
    proto = micronet.export_onnx(net, torch.randn(2, 1, 8, 12), dynamic="batch,width", skip_timing=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    assert session.get_inputs()[0].shape == ["batch", 1, 8, "width"]
    for width in (3, 31):
        x = torch.randn(3, 1, 8, width)
        np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], net(x).detach().numpy(), atol=1e-5)


def test_a_height_that_a_recurrent_network_fixes_is_named():
    with pytest.raises(micronet.MicronetError, match="fixes the size of the axis height"):
        micronet.export_onnx(Reading().eval(), torch.randn(2, 1, 8, 12), dynamic="batch,height,width")
