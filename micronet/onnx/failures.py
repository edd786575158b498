"""Why torch could not export a network to ONNX, in the words of the network's author."""

import inspect
import traceback
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils import rnn

from micronet.errors import first_line
from micronet.graph.user_lines import error_line

_PACKING = {"pack_padded_sequence", "pad_packed_sequence", "pack_sequence"}
_GROUPS = 6  # the position of a convolution's groups among the arguments of ``aten.conv2d``


def describe_failure(error: Exception, model: nn.Module, cure: str) -> str:
    """Return why the exporter failed, in one line: the module, where its forward is, and what ONNX cannot hold.

    ``cure``: what to try, which is added if it may help.
    """
    undecided = next((each for each in _causes(error) if isinstance(each, GuardOnDataDependentSymNode)), None)
    if undecided is not None:
        return (
            f"a size depends on the values of the inputs{error_line(undecided)}; write that part with tensor "
            "operations that keep the sizes, such as torch.where(condition, a, b)"
        )
    packed = next((each for each in _causes(error) if _reads_packed(each)), None)
    if packed is not None:
        return (
            f"ONNX has no packed sequences{error_line(packed)}; run the layer on the padded ones, and select its "
            "outputs by the lengths"
        )
    if any(type(each).__name__ == "DispatchError" for each in _causes(error)) and not _is_of_sizes(_node_of(error)):
        return f"{_reason(error, model)}; write that part with other operations of torch"
    return _reason(error, model) + cure


def _reason(error: Exception, model: nn.Module) -> str:
    node = _node_of(error)
    if node is None:
        return first_line(error.__cause__ or error)
    function = str(getattr(node.target, "_opname", node.name))
    if function.startswith("conv") and any(isinstance(each, fx.Node) for each in node.args[_GROUPS:]):
        return f"{function}() {_place(node, model)} has a number of groups that depends on the size of the batch"
    return f"ONNX has no operator for {function}() {_place(node, model)}, or not with its arguments"


def _node_of(error: Exception) -> fx.Node | None:
    return next((found for each in _causes(error) for found in _nodes(each)), None)


def _is_of_sizes(node: fx.Node | None) -> bool:
    """Return True for an operation on sizes, which are numbers if no axis is dynamic."""
    return node is None or not hasattr(node.target, "_opname")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reads_packed(error: BaseException) -> bool:
    """Return True if an error is from a recurrent layer that ran on a packed sequence, or from packing one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") in (rnn.__name__, nn.RNNBase.__module__) and (
            frame.f_code.co_name in _PACKING
            or any(isinstance(value, rnn.PackedSequence) for value in frame.f_locals.values())
        ):
            return True
    return False


def _nodes(error: BaseException) -> Iterator[fx.Node]:
    """Yield the nodes that the exporter was translating: its errors name them in a text of many lines."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = (value for value in frame.f_locals.values() if isinstance(value, fx.Node))
        yield from (node for node in found if node.op.startswith("call"))


def _place(node: fx.Node, model: nn.Module) -> str:
    """Return "in MODULE (CLASS.forward at FILE:LINE)" for the innermost module that computed a node."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    name = next(reversed([path for path, _ in stack.values()] or [""]))
    modules = dict(model.named_modules())
    kind = type(modules.get(name, model))
    where = f"in {name}" if name else "in the network"
    if kind.__module__.startswith("torch."):  # a container, or a network rewritten to hold quantizers
        return where
    try:
        line = inspect.getsourcelines(kind.forward)[1]
        return f"{where} ({kind.__name__}.forward at {inspect.getsourcefile(kind.forward)}:{line})"
    except (OSError, TypeError):  # code recorded in an artifact has no source file
        return f"{where} ({kind.__name__})"
