"""Running traced forwards on an example, to record the shape of every result."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from micronet.graph import ops
from micronet.graph.graph_module import GraphModule
from micronet.pruning.ids import is_empty, without_ids
from micronet.pruning.kinds import kind_of

Key = tuple[int, str]  # a graph's index and a node's name


@dataclass(frozen=True)
class RandomTensor:
    """A tensor of numbers or truth values without these."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def draw(self, ends: tuple[float, float], generator: torch.Generator) -> Tensor:
        """Return random numbers between two ends."""
        drawn = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.dtype == torch.bool:
            return (drawn > 0.5).to(self.device)
        return (drawn * (ends[1] - ends[0]) + ends[0]).to(self.device, self.dtype)


@dataclass
class Recording:
    """What the nodes of a network's graphs were given and returned for an example.

    Attributes:
        results: Each node's result, with ``FIXED`` in every tensor.
        arguments: Those of each operation that may be run again; numbers that are not integers have lost their values.
    """

    results: dict[Key, Any] = field(default_factory=dict)
    arguments: dict[Key, Any] = field(default_factory=dict)

    def has(self, graph: int) -> bool:
        """Return True if a graph has run."""
        return any(index == graph for index, _ in self.results)

    def has_empty(self, graph: int) -> bool:
        """Return True if a result of a graph has a tensor without elements."""
        return is_empty([each for (index, _), each in self.results.items() if index == graph])

    def update(self, other: "Recording") -> None:
        """Replace what another recording of the same graphs holds."""
        self.results.update(other.results)
        self.arguments.update(other.arguments)

    def clear(self) -> None:
        """Forget everything."""
        self.results.clear()
        self.arguments.clear()


class Run(nn.Module):
    """A traced forward that records the result of each node while it runs; ``index``: of its graph.

    ``select_some``: where a forward selects elements by their values and there are none, take the first one, so that
    the layers behind it compute something; what the network returns is wrong then.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, index: int, recording: Recording, *, select_some: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._graph, self._index, self._recording, self._select_some = graph, index, recording, select_some

    def forward(self, *inputs: Any) -> Any:
        """Return what the network returns."""
        recorder = _SelectingRecorder if self._select_some else _Recorder
        return recorder(self.model, self._graph, self._index, self._recording).run(*inputs)


class _Recorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, index: int, recording: Recording) -> None:
        super().__init__(GraphModule(model, graph))
        self._index, self._recording = index, recording

    def run_node(self, n: fx.Node) -> Any:
        key = self._index, n.name
        if _may_run_again(n, self.submodules.get(str(n.target)) if n.op == "call_module" else None):
            self._recording.arguments[key] = tree_map(_without_values, self.fetch_args_kwargs_from_env(n))
        result = super().run_node(n)
        self._recording.results[key] = tree_map(without_ids, result)
        return result


class _SelectingRecorder(_Recorder):
    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.op != "call_module" and ops.SELECTS.matches(n):
            args, kwargs = tree_map(_with_some, (args, kwargs))
        return args, kwargs


def _with_some(value: Any) -> Any:
    """Return a mask with its first element set if it has none that is set; anything else unchanged."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or not value.numel() or value.any():
        return value
    first = torch.zeros_like(value)
    first.view(-1)[0] = True
    return first


def _may_run_again(node: fx.Node, module: nn.Module | None) -> bool:
    """Return True for operations whose channels may have to be found by running them: see ``channelwise``."""
    kind = kind_of(node, module) if node.op.startswith("call_") else "none"
    return kind in ("", "attending", "moving") and node.target is not getattr


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        return RandomTensor(value.shape, value.dtype, value.device)
    return value
