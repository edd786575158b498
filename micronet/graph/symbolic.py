"""Symbolic tracing by torch.fx: a forward runs on proxies, so no data are needed."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import fx, nn

from micronet.errors import MicronetError
from micronet.graph.leaves import find_leaves
from micronet.graph.record import uncompiled_modules
from micronet.models.modes import state_kept


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves
        self.branches = False  # whether the forward asked a proxy for its truth, and caught the error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise torch's error; a forward that catches it takes another branch than for a tensor."""
        self.branches = True
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        """Return what a graph holds for a value; torch.fx takes dicts that are dataclasses for plain ones."""
        kind: Any = type(a)
        if issubclass(kind, dict) and hasattr(kind, "__dataclass_fields__"):
            parts = {each.name: self.create_arg(getattr(a, each.name)) for each in fields(kind) if each.init}
            return self.create_node("call_function", kind, (), parts)
        return super().create_arg(a)


def symbolic(model: nn.Module, *, training: bool, buffers: bool = False) -> fx.Graph:
    """Trace a network in training or eval mode; its modes, attributes and buffers stay as they are.

    ``buffers``: follow what the forward computes from its buffers, which otherwise becomes a constant. Raises
    MicronetError if a forward changes its buffers and they are not followed, or if the network has hooks of its own,
    which torch.fx leaves out; and whatever the forward raises.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        raise MicronetError("torch.fx does not trace the network's own hooks")
    with state_kept(model), uncompiled_modules():
        tracer = _Tracer(find_leaves(model))
        # By default False, because the node names in older files rely on it.
        tracer.proxy_buffer_attributes = buffers or isinstance(model, fx.GraphModule)
        versions = {name: buffer._version for name, buffer in _user_buffers(model)}
        try:
            graph = tracer.trace(model.train(training))
        except Exception:  # torch.fx cannot trace every call that a graph may hold, such as torch.zeros of a size
            if not isinstance(model, fx.GraphModule) or not set(_called(model)) <= tracer.leaves:
                raise
            graph = _copied(model.graph)
        if tracer.branches:
            raise MicronetError("forward() branches on a tensor, and catches the error that a proxy raises there")
        if versions != {name: getattr(buffer, "_version", None) for name, buffer in _user_buffers(model)}:
            raise MicronetError("forward() changes its buffers")
        constants = {name: value for name, value in vars(model).items() if name.startswith("_tensor_constant")}
    vars(model).update(constants)  # torch.fx keeps them there
    return graph


def _user_buffers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a network's buffers, except norms' counters of batches, which plain layers update."""
    yield from (item for item in model.named_buffers() if not item[0].endswith("num_batches_tracked"))


def _called(model: fx.GraphModule) -> list[nn.Module]:
    return [model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"]


def _copied(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def mode_keys(training: fx.Graph, evaluating: fx.Graph) -> dict[str, str | int] | None:
    """Return where each mode-dependent function call takes its mode, or None if the graphs differ in more."""
    if len(training.nodes) != len(evaluating.nodes):
        return None
    keys: dict[str, str | int] = {}
    for train, evaluation in zip(training.nodes, evaluating.nodes, strict=True):
        if train.op == evaluation.op == "get_attr" and str(train.target).startswith("_tensor_constant"):
            continue  # made by the forward itself, and named anew by every trace
        before, after = ({**dict(enumerate(node.args)), **node.kwargs} for node in (train, evaluation))
        if (train.op, train.target, before.keys()) != (evaluation.op, evaluation.target, after.keys()):
            return None
        differing = [key for key in before if str(before[key]) != str(after[key])]
        if not differing:
            continue
        if train.op != "call_function" or [(before[key], after[key]) for key in differing] != [(True, False)]:
            return None
        keys[evaluation.name] = differing[0]
    return keys
