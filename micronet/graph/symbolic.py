"""Symbolic tracing by torch.fx: a forward runs on proxies, so no data are needed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from micronet.errors import MicronetError
from micronet.graph.leaves import find_leaves
from micronet.graph.numpy_values import from_numpy
from micronet.graph.ops import ROW_LAYERS, is_opaque, writes_in_place
from micronet.graph.sources import computed_only_from
from micronet.graph.uncompiled import uncompiled_modules
from micronet.models.modes import same_bits, state_kept

MADE = "_tensor_constant"  # what torch.fx names tensors that a forward makes
_MAKERS = {getattr(torch, name): name for name in ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")}


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves
        self.branches = False  # whether the forward asked a proxy for its truth, and caught the error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise torch's error; a forward that catches it takes another branch than for a tensor.

        Whether a tensor is on a GPU is only asked to put another one there. A graph's constants are where it is; what
        it makes anew is not.
        """
        if obj.node.target is getattr and obj.node.args[1] == "is_cuda":
            made = (node for node in self.graph.nodes if node.target in _MAKERS and "device" not in node.kwargs)
            if next(made, None) is None:
                return any(parameter.is_cuda for parameter in self.root.parameters())
        self.branches = True
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        """Return what a graph holds for a value; torch.fx takes dicts that are dataclasses for plain ones."""
        a = from_numpy(a)
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
    made = isinstance(model, fx.GraphModule)  # whose node names earlier files hold
    with state_kept(model), uncompiled_modules(), nullcontext() if made else _tensors_of_sizes():
        tracer = _Tracer(find_leaves(model))
        # By default False, because the node names in older files rely on it.
        tracer.proxy_buffer_attributes = buffers or made
        versions = {name: buffer._version for name, buffer in _user_buffers(model)}
        known = {name: value for name, value in vars(model).items() if name.startswith(MADE)}
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
        constants = {name: value for name, value in vars(model).items() if name.startswith(MADE)}
        if not keeps_state(graph):
            constants = _name_constants(graph, model, known)
    vars(model).update(constants)  # torch.fx keeps them there
    return graph


@contextmanager
def _tensors_of_sizes() -> Iterator[None]:
    """Let torch's functions that make tensors take proxies for sizes in this context, as in ``torch.ones(len, 9)``."""
    before = {name: getattr(torch, name) for name in _MAKERS.values()}
    for make, name in _MAKERS.items():
        setattr(torch, name, partial(_make, make))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(torch, name, own)


def _make(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function that makes a tensor, or trace the call if an argument is a proxy."""
    proxy = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
    return make(*args, **kwargs) if proxy is None else proxy.tracer.create_proxy("call_function", make, args, kwargs)


def hides_work(graph: fx.Graph, model: nn.Module) -> bool:
    """Return True if a function that ``torch.fx.wrap`` keeps as one node takes a layer's weight, or only writes.

    Where nobody reads its result, it writes into its arguments.
    """
    for node in filter(is_opaque, graph.nodes):
        owners = (str(each.target).rpartition(".")[0] for each in node.all_input_nodes if each.op == "get_attr")
        if not node.users or any(isinstance(model.get_submodule(owner), ROW_LAYERS) for owner in owners):
            return True
    return False


def equal_graphs(first: fx.Graph, second: fx.Graph, model: nn.Module) -> bool:
    """Return True if two traces of a network have the same nodes; each trace names anew what the forward makes."""
    if len(first.nodes) != len(second.nodes):
        return False
    for one, other in zip(first.nodes, second.nodes, strict=True):
        if all(node.op == "get_attr" and str(node.target).startswith(MADE) for node in (one, other)):
            made, again = (getattr(model, str(node.target)) for node in (one, other))
            if made.dtype != again.dtype or not torch.equal(made, again):
                return False
        elif (one.op, one.name, one.target) != (other.op, other.name, other.target):
            return False
    return True


def keeps_state(graph: fx.Graph) -> bool:
    """Return True if a graph writes into tensors that its forward makes anew in every call, and the graph does not."""
    made = computed_only_from(graph, _is_made)
    written = (node.args[0] for node in graph.nodes if node.args and writes_in_place(node))
    return any(isinstance(each, fx.Node) and each in made for each in written)


def _name_constants(graph: fx.Graph, model: nn.Module, known: dict[str, Any]) -> dict[str, Any]:
    """Give tensors that a forward makes the names of equal ones that are ``known``, or else the next ones.

    Each trace would name them anew, and a file holds them by name. Returns all by name.
    """
    constants = dict(known)
    for node in graph.nodes:
        value = vars(model).get(str(node.target))
        if not _is_made(node) or value is None or node.target in known:
            continue
        same = (name for name, other in constants.items() if same_bits(value, other))
        taken = constants.keys() | model._buffers.keys()
        node.target = next(same, "") or next(name for n in count() if (name := f"{MADE}{n}") not in taken)
        constants[node.target] = value
    return constants


def _is_made(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(MADE)


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
    same: dict[fx.Node, fx.Node] = {}  # nodes that read tensors made by the forward have other names in every trace
    for train, evaluation in zip(training.nodes, evaluating.nodes, strict=True):
        same[train] = evaluation
        arguments = fx.node.map_arg((train.args, train.kwargs), same.__getitem__), (evaluation.args, evaluation.kwargs)
        before, after = ({**dict(enumerate(args)), **kwargs} for args, kwargs in arguments)
        if (train.op, train.target, before.keys()) != (evaluation.op, evaluation.target, after.keys()):
            return None
        differing = [key for key in before if str(before[key]) != str(after[key])]
        if not differing:
            continue
        if train.op != "call_function" or [(before[key], after[key]) for key in differing] != [(True, False)]:
            return None
        keys[evaluation.name] = differing[0]
    return keys
