"""Recurrent layers as ONNX's LSTM, GRU and RNN operators; torch's exporter would write every step out.

torch orders the gates of an LSTM i, f, g, o and those of a GRU r, z, n; ONNX orders them i, o, f, c and z, r, h. An
operator of ONNX is one layer, in one or both directions, of (steps, batch, features).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnxscript
import torch
from torch import Tensor, nn
from torch._decomp import decompositions


@dataclass(frozen=True)
class _Kind:
    """An operator of ONNX: its name, where its gates are among torch's, and further attributes."""

    name: str
    gates: tuple[int, ...]
    linear_before_reset: bool = False
    activation: str | None = None


_KINDS = {
    "lstm": _Kind("LSTM", (0, 3, 1, 2)),
    "gru": _Kind("GRU", (1, 0, 2), linear_before_reset=True),
    "rnn_tanh": _Kind("RNN", (0,)),
    "rnn_relu": _Kind("RNN", (0,), activation="Relu"),
}


def recurrent_translations(model: nn.Module, opset: int) -> dict[Any, Callable[..., Any]]:
    """Return how the exporter translates the recurrent layers of a network: torch operator -> function.

    LSTMs are left out if one of them projects its outputs (``proj_size``), which ONNX's operator cannot do.
    """
    op = getattr(onnxscript, f"opset{opset}")
    return {
        getattr(torch.ops.aten, name).input: _translation(op, kind)
        for name, kind in _KINDS.items()
        if not (_projects(model) and kind.name == "LSTM")
    }


@contextmanager
def shapes_alone(model: nn.Module) -> Iterator[None]:
    """Let torch find the shapes of recurrent layers without a walk through their steps, in this context.

    The exporter runs a network three times on tensors without values, and there these layers are Python loops over
    steps: a minute for some hundred. The loop is private in torch, which offers no other way around it. It stays if it
    is part of the exported graph, as LSTMs with ``proj_size`` are.
    """
    walk: Any = decompositions._rnn_helper

    def shapes(x: Tensor, hidden: Any, *others: Any) -> tuple[Tensor, Any]:
        """Return tensors like a layer's outputs and its last states: a list of tensors or, of an LSTM, of pairs."""
        if x.dim() != 3:  # a packed sequence, which is not translated
            found: tuple[Tensor, Any] = walk(x, hidden, *others)
            return found
        state, bidirectional = hidden[0] if isinstance(hidden[0], Tensor) else hidden[0][0], others[5]
        return x.new_empty(*x.shape[:2], state.shape[-1] * (1 + bidirectional)), list(hidden)

    try:
        if not _projects(model):
            decompositions._rnn_helper = shapes
        yield
    finally:
        decompositions._rnn_helper = walk


def _projects(model: nn.Module) -> bool:
    return any(isinstance(module, nn.LSTM) and module.proj_size for module in model.modules())


def _translation(op: Any, kind: _Kind) -> Callable[..., Any]:
    def layer(x: Any, states: list[Any], params: list[list[Any]], biased: bool) -> tuple[Any, list[Any]]:
        """Return the outputs (steps, batch, directions * hidden) and the last states of one layer."""
        hidden = params[0][1].shape[-1]
        weights = [[_reordered(op, each, kind.gates, hidden) for each in direction] for direction in params]
        w, r = (_stacked(op, [direction[index] for direction in weights]) for index in (0, 1))
        b = _stacked(op, [op.Concat(*direction[2:], axis=0) for direction in weights]) if biased else None
        options: dict[str, Any] = {"hidden_size": hidden}
        options["direction"] = "bidirectional" if len(params) > 1 else "forward"
        if kind.linear_before_reset:
            options["linear_before_reset"] = 1
        if kind.activation:
            options["activations"] = [kind.activation] * len(params)
        y, *last = getattr(op, kind.name)(x, w, r, b, None, *states, **options)
        turned = op.Transpose(y, perm=[0, 2, 1, 3])  # (steps, batch, directions, hidden)
        return op.Reshape(turned, op.Constant(value_ints=[0, 0, -1])), last[: len(states)]

    def write(
        x: Any, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states, directions = [hx] if kind.name != "LSTM" else list(hx), 1 + bidirectional
        own = 4 if has_biases else 2
        tensors = [list(params[start : start + own]) for start in range(0, len(params), own)]
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        found: list[list[Any]] = []
        for start in range(0, num_layers * directions, directions):
            rows = op.Constant(value_ints=[start]), op.Constant(value_ints=[start + directions])
            first = [op.Slice(state, *rows, op.Constant(value_ints=[0])) for state in states]
            x, last = layer(x, first, tensors[start : start + directions], has_biases)
            found.append(last)
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        return x, *(op.Concat(*each, axis=0) for each in zip(*found, strict=True))

    return write


def _reordered(op: Any, tensor: Any, gates: tuple[int, ...], hidden: int) -> Any:
    """Return a weight or bias with its gates, blocks of ``hidden`` rows, in ONNX's order."""
    if len(gates) == 1:
        return tensor
    axis = op.Constant(value_ints=[0])
    parts = [
        op.Slice(tensor, op.Constant(value_ints=[gate * hidden]), op.Constant(value_ints=[(gate + 1) * hidden]), axis)
        for gate in gates
    ]
    return op.Concat(*parts, axis=0)


def _stacked(op: Any, tensors: list[Any]) -> Any:
    """Return tensors, one for each direction, along a new first axis."""
    axis = op.Constant(value_ints=[0])
    return op.Concat(*(op.Unsqueeze(each, axis) for each in tensors), axis=0)
