"""One step of a recurrent network as two linear layers; torch's cells hold the same weights, but no layers.

The formulas, and the gates' order in the weights, are those of ``nn.GRUCell``, ``nn.LSTMCell`` and ``nn.RNNCell``.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Cell(nn.Module):
    """A replacement of torch's cells: ``ih`` applies to the input, ``hh`` to the hidden state."""

    ih: nn.Linear
    hh: nn.Linear
    input_size: int  # as torch's, for forwards that read them
    hidden_size: int
    bias: bool

    @classmethod
    def from_torch(cls, cell: nn.RNNCellBase) -> "Cell":
        """Return an equal cell of the class for torch's, with the same parameters; it must be ``is_cell``."""
        split: Cell = _KINDS[type(cell)]()
        split.input_size, split.hidden_size, split.bias = cell.input_size, cell.hidden_size, cell.bias
        for name in ("ih", "hh"):
            weight, bias = getattr(cell, f"weight_{name}"), getattr(cell, f"bias_{name}", None)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight, layer.bias = weight, bias  # type: ignore[assignment]  # torch's None of a layer without one
            setattr(split, name, layer)
        if isinstance(split, RNNCell):
            split.nonlinearity = str(cell.nonlinearity)
        return split.train(cell.training)

    def _zeros(self, x: Tensor) -> Tensor:
        """Return the state before the first step: (N, H), or (H,) for an input without N."""
        return x.new_zeros(*x.shape[:-1], self.hh.in_features)


class GRUCell(Cell):
    """A gated recurrent unit."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """(N, I) and the state (N, H), 0 by default, -> (N, H)."""
        state = self._zeros(input) if hx is None else hx
        from_input, from_state = self.ih(input).chunk(3, -1), self.hh(state).chunk(3, -1)
        reset = torch.sigmoid(from_input[0] + from_state[0])
        update = torch.sigmoid(from_input[1] + from_state[1])
        new = torch.tanh(from_input[2] + reset * from_state[2])
        return new + update * (state - new)


class LSTMCell(Cell):
    """A long short-term memory cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(N, I) and the states h and c, (N, H) each, 0 by default, -> both."""
        h, c = (self._zeros(input), self._zeros(input)) if hx is None else hx
        i, f, g, o = (self.ih(input) + self.hh(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class RNNCell(Cell):
    """A step of Elman's network."""

    nonlinearity = "tanh"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """(N, I) and the state (N, H), 0 by default, -> (N, H)."""
        state = self.ih(input) + self.hh(self._zeros(input) if hx is None else hx)
        return torch.tanh(state) if self.nonlinearity == "tanh" else torch.relu(state)


_KINDS: dict[Any, Any] = {nn.GRUCell: GRUCell, nn.LSTMCell: LSTMCell, nn.RNNCell: RNNCell}


def is_cell(module: nn.Module) -> bool:
    """Return True if a module is an unmodified cell of torch's, which ``Cell`` can replace."""
    return type(module) in _KINDS and not (
        module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None)
    )
