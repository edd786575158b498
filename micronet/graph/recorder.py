"""The recorder of a running forward: one node of a graph for every call of a torch function or a leaf module."""

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from micronet.errors import MicronetError, count
from micronet.graph.leaves import find_leaves
from micronet.graph.numpy_values import from_numpy
from micronet.graph.size import SIZE_ARITHMETIC, Size, is_size
from micronet.graph.sources import is_selected
from micronet.graph.user_lines import user_line
from micronet.models.outputs import tensors_in

CONSTANT = "recorded_constant_"  # prefix of the names of tensors that are neither inputs, parameters nor buffers
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__floordiv__": operator.floordiv,
    "__invert__": operator.invert, "__eq__": operator.eq, "__truediv__": operator.truediv,
}  # fmt: skip
_REFLECTED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv, "__rmod__": operator.mod, "__rmatmul__": operator.matmul,
}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Adds a node to a graph for every call of a torch function or a leaf module."""

    def __init__(self, model: nn.Module, *, training: bool = False, into_leaves: bool = False) -> None:
        super().__init__()
        self._training, self._into_leaves = training, into_leaves
        self.graph = fx.Graph()
        self.root: Any = type(type(model).__name__, (nn.Module,), {})()  # graphs are called as their network is
        self.root.training = model.training
        for name, child in model.named_children():
            self.root.add_module(name, child)
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._nodes: dict[int, fx.Node] = {}  # a tensor's id -> the node that computed it
        self._kept: list[Any] = []  # the tensors, so that no other object gets the id of one
        self._inside: Any = None  # the leaf or the torch function that runs
        self._arguments: Any = ()  # the nodes that the leaf was called with
        self.reads = self.selects_none = ""  # the line that reads values, and that which finds nothing selected
        for name, tensor in (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)):
            if isinstance(tensor, nn.Parameter):
                self.root.register_parameter(name, tensor)
            else:
                self.root.register_buffer(name, tensor, name not in model._non_persistent_buffers_set)
        self._stored = {
            id(tensor): name
            for name, tensor in (
                *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False),
            )
        }  # fmt: skip

    def placeholders(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Add a placeholder for every input; return the inputs. Raises TypeError if there are too many."""
        parameters = list(inspect.signature(self._model.forward).parameters.values())
        variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        names = [each.name for each in parameters if each.kind not in (each.KEYWORD_ONLY, each.VAR_KEYWORD)]
        if len(inputs) > len(names) and not variadic:
            raise TypeError(
                f"forward() takes {count(len(names), 'input')} ({', '.join(names)}), but {len(inputs)} were given; "
                "pass the inputs alone, without labels"
            )
        found = []
        for number, value in enumerate(inputs):
            node = self.graph.placeholder(f"input_{number}" if variadic else names[number])
            if isinstance(value, Tensor):
                value = value.detach()
                self._keep(value, node)
            found.append(value)
        return found

    @contextmanager
    def leaves(self) -> Iterator[None]:
        """Make calls of leaf modules nodes, in this context: hooks around each leaf's own hooks see its calls."""
        handles: list[Any] = []
        for leaf in find_leaves(self._model, into_leaves=self._into_leaves) - {self._model}:
            if isinstance(leaf, torch.jit.ScriptModule):  # it takes no hooks
                continue
            handles.append(leaf.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(leaf.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        handles.append(register_module_forward_hook(self._leave_scripted, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside is None:
            self._inside, self._arguments = module, self.argument((tuple(args), kwargs))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if self._inside is module:
            self._inside = None
            if value is not None:  # it is None after an error too
                self._result(value, self.graph.create_node("call_module", self._names[module], *self._arguments))

    def _leave_scripted(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if isinstance(module, torch.jit.ScriptModule) and self._inside is None and module in self._names:
            inputs = self.argument((tuple(args), kwargs))
            self._result(value, self.graph.create_node("call_module", self._names[module], *inputs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function; record it if it is the forward's own call."""
        kwargs = kwargs or {}
        if self._inside is not None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, func.__self__.__name__, args[0])
        if name in _OPERATORS:
            return self._call(lambda: func(*args, **kwargs), "call_function", _OPERATORS[name], args, kwargs)
        if name in _REFLECTED:
            target = _REFLECTED[name]
            return self._call(lambda: func(*args, **kwargs), "call_function", target, (args[1], args[0]), kwargs)
        method = isinstance(func, (MethodDescriptorType, WrapperDescriptorType))
        method = method or getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase."))
        kind = "call_method" if method else "call_function"
        return self._call(lambda: func(*args, **kwargs), kind, name if method else func, args, kwargs)

    def _attribute(self, getter: Any, name: str, tensor: Tensor) -> Any:
        value = getter(tensor)
        if not isinstance(value, (Tensor, torch.Size)):
            return value
        if name == "shape":
            self._note_selection(tensor)
        node = self.graph.call_function(getattr, (self.argument(tensor), name))
        return self._result(value, node)

    def _note_selection(self, tensor: Any) -> None:
        """Note the line that reads the size of a tensor which a mask left without elements: it may skip layers."""
        node = self._nodes.get(id(tensor))
        if node is not None and not self.selects_none and not tensor.numel() and is_selected(node):
            self.selects_none = user_line(traceback.extract_stack())

    def _call(self, run: Callable[[], Any], kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        recorded = any(map(self._is_recorded, tree_leaves((args, kwargs))))
        nodes = self.argument((tuple(args), kwargs)) if recorded else None
        if nodes is not None and kwargs.get("device") is not None:  # it follows the network to another device
            nodes[1]["device"] = self.graph.call_function(getattr, (self._first_input(), "device"))
        if target in _READS_SIZES:
            self._note_selection(args[0])
        self._inside, before = run, None if recorded else torch.get_rng_state()
        try:
            value = run()
        finally:
            self._inside = None
        if before is not None and self._training and not torch.equal(before, torch.get_rng_state()):  # random numbers
            nodes = self.argument((tuple(args), kwargs))
        sizes = isinstance(value, torch.Size) or (kind == "call_method" and target in ("size", "numel"))
        holds_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        if nodes is None or not (sizes or holds_tensors or target is operator.setitem):
            if nodes is not None and target in _READS_VALUES and not self.reads and _depend_on_values(nodes):
                self.reads = user_line(traceback.extract_stack())
            return value  # a constant, or a fact such as a rank, fixed as it is for the example
        if target in DROPOUTS:
            return self._result(value, self._dropout(DROPOUTS[target], nodes[0][0], kwargs["p"]))
        node = self.graph.create_node(kind, target, *nodes)
        return self._result(value, node)

    def _first_input(self) -> fx.Node:
        """Return the first input's node. Before it are reads of frozen norms, made when leaves were looked for.

        To look for them outside would number constants anew, whose names are in earlier artifacts.
        """
        nodes: list[fx.Node] = list(self.graph.nodes)
        return next((node for node in nodes if node.op == "placeholder"), nodes[0])

    def _dropout(self, kind: type[nn.Module], x: fx.Node, p: float) -> fx.Node:
        """Return a call of a dropout that follows the network's mode: while recording, the function's is eval."""
        name = f"recorded_dropout_{len(self._kept)}"
        self.root.add_module(name, kind(p).train(self.root.training))
        return self.graph.call_module(name, (x,))

    def _result(self, value: Any, node: fx.Node) -> Any:
        """Remember which node computed a value, or its parts; return the value, with sizes that know their nodes."""
        if isinstance(value, Tensor):
            return self._keep(value, node)
        if isinstance(value, int) and not isinstance(value, bool):
            return Size(value, node)
        if isinstance(value, dict):
            for key, part in value.items():
                self._result(part, self.graph.call_function(operator.getitem, (node, key)))
            return value
        if isinstance(value, (tuple, list)):
            parts = [
                self._result(part, self.graph.call_function(operator.getitem, (node, number)))
                for number, part in enumerate(value)
            ]
            return torch.Size(parts) if isinstance(value, torch.Size) else value
        return value

    def _keep(self, tensor: Tensor, node: fx.Node) -> Tensor:
        self._kept.append(tensor)
        self._nodes[id(tensor)] = node
        return tensor

    def _is_recorded(self, value: Any) -> bool:
        """Return True if a value depends on the network's inputs or tensors."""
        return isinstance(value, Size) or (
            isinstance(value, Tensor) and (id(value) in self._nodes or id(value) in self._stored)
        )

    def argument(self, value: Any) -> Any:
        """Return the node of a tensor or a size, or the value with nodes in place of those inside it."""
        if isinstance(value, Size):
            return value.node
        value = from_numpy(value)
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._stored_tensor(value)
        if is_dataclass(value) and not isinstance(value, type):
            own = {each.name: self.argument(getattr(value, each.name)) for each in fields(value) if each.init}
            return self.graph.call_function(type(value), (), own)
        if isinstance(value, dict):
            return {key: self.argument(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            parts = [self.argument(part) for part in value]
            if hasattr(value, "_fields"):  # a graph's code cannot build a named tuple inside another structure
                return self.graph.call_function(type(value), tuple(parts))
            return tuple(parts) if isinstance(value, tuple) else parts
        if any(map(self._is_recorded, tensors_in(value))):
            raise MicronetError(
                f"forward() uses an object of the class {type(value).__name__}, whose tensors a traced graph cannot "
                "build again; make it a dict, a named tuple or a dataclass, or do without it (use_cache=False for the "
                "cache of a transformer)"
            )
        return value

    def _stored_tensor(self, tensor: Tensor) -> fx.Node:
        """Return a node that reads a parameter, a buffer or a constant."""
        name = self._stored.get(id(tensor))
        if name is None:
            name = f"{CONSTANT}{len(self._kept)}"
            self.root.register_buffer(name, tensor.detach().clone(), persistent=False)
        node = self.graph.get_attr(name)
        self._keep(tensor, node)
        return node

    def find_replaced_buffers(self) -> None:
        """Count a buffer that became a new tensor, computed from the inputs' values, as a read of values."""
        for _, buffer in self._model.named_buffers():
            node = self._nodes.get(id(buffer))
            if node is not None and id(buffer) not in self._stored and _depend_on_values([node]):
                self.reads = self.reads or " in a buffer that is replaced"

    def remove_unused(self) -> None:
        """Remove sizes, parts and stored tensors that nothing reads, as when leaves were looked for."""
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in SIZE_ARITHMETIC):
                self.graph.erase_node(node)


_READS_VALUES = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "equal", "numpy"}
_READS_SIZES = {"__len__", "size", "numel"}
DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip


def _depend_on_values(nodes: Any) -> bool:
    """Return True if nodes compute from the values of the network's inputs, not only from their sizes, or at random."""
    waiting: list[fx.Node] = []
    fx.map_arg(nodes, waiting.append)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" or (node.op.startswith("call") and not node.all_input_nodes):
            return True
        if not is_size(node):
            more = set(node.all_input_nodes) - seen
            seen |= more
            waiting += more
    return False
