"""Recurrent cells as two linear layers: equal to torch's, and quantized wherever a forward calls them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from micronet.models.cells import Cell, is_cell
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model, restore

MAKES = [
    lambda: nn.GRUCell(5, 8),
    lambda: nn.LSTMCell(5, 8, bias=False),
    lambda: nn.RNNCell(5, 8),
    lambda: nn.RNNCell(5, 8, nonlinearity="relu"),
]
IDS = ["gru", "lstm", "rnn", "rnn relu"]


class Steps(nn.Module):
    """A cell that is called once for every step, and a head."""

    def __init__(self, make=MAKES[1]):
        super().__init__()
        self.cell, self.head = make(), nn.Linear(8, 3)
        self.begins = not isinstance(self.cell, nn.LSTMCell)

    def forward(self, x):
        state = None
        if self.begins:
            state = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(tree_leaves(state)[0])


@pytest.mark.parametrize("make", MAKES, ids=IDS)
def test_a_split_cell_computes_what_torchs_does(make):
    cell, x, h = make(), torch.randn(3, 5), torch.randn(3, 8)
    state = (h, torch.randn(3, 8)) if isinstance(cell, nn.LSTMCell) else h
    split = Cell.from_torch(cell)
    for given in ((x, state), (x,), (x[0],)):
        torch.testing.assert_close(split(*given), cell(*given))
    assert split.hh.weight is cell.weight_hh
    cell.register_forward_hook(lambda *_: None)
    assert not is_cell(cell)


@pytest.mark.parametrize("make", MAKES, ids=IDS)
def test_both_layers_of_a_cell_are_quantized_and_restored(make):
    model, x = Steps(make), torch.randn(6, 4, 5)
    quantized, record = quantize_model(model, QuantConfig(), x)
    calibrate(quantized, [x])
    assert not record.result["left_float"] and {"cell.ih", "cell.hh", "head"} == set(record.result["inputs"])
    difference = (quantized(x) - model(x)).norm() / model(x).norm()
    assert 0 < difference < 0.1
    again = restore(copy.deepcopy(model), record)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(x), quantized(x))


def test_attention_is_quantized_beside_a_cell_whose_own_tensors_are_read():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.cell = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRUCell(8, 8)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.cell(x[:, 0], x[:, 1] + self.cell.weight_hh.mean())

    _, record = quantize_model(Both(), QuantConfig(), torch.randn(4, 3, 8))
    assert {"attention.q_proj", "attention.out_proj"} <= set(record.result["inputs"])
    assert "reads its own tensors" in record.result["left_float"]["cell"]
