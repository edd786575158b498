"""A network's forward recorded while it runs on an example, for forwards that torch.fx cannot trace symbolically.

Python runs as it is written: loops, branches, iteration, shapes. What comes out is the same kind of graph as from
torch.fx, with one node per call of a leaf module or of a torch function. Sizes stay symbolic while the forward only
passes them on or combines them by integer arithmetic; every other decision is fixed as it was for the example.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from micronet.errors import MicronetError, first_line
from micronet.graph.agreement import ROUNDING, agree, agree_if_taken, follows_batch
from micronet.graph.graph_module import GraphModule, uncalled
from micronet.graph.parting import parting_line
from micronet.graph.plain import PlainLayer, make_plain, with_plain
from micronet.graph.python_sizes import python_sizes
from micronet.graph.recorder import Recorder
from micronet.graph.training import follow_mode
from micronet.graph.uncompiled import uncompiled_modules
from micronet.graph.user_lines import error_line
from micronet.models.device import Example, as_inputs, copied
from micronet.models.inputs import check_python, describe_inputs, make_inputs
from micronet.models.modes import copy_model, random_kept, state_kept
from micronet.models.spec import LARGEST_INPUT


class UnbuiltError(MicronetError):
    """A network whose layers do not exist yet: each copy of it would build others."""


def record_network(model: nn.Module, example: Example) -> tuple[fx.GraphModule, dict[str, PlainLayer]]:
    """Run a network on an example, and return what it computed as a network that torch.fx can trace.

    It runs in both modes; what it does in training mode alone is kept or refused there (see ``graph.training``).

    Args:
        model: The network.
        example: An input, or a tuple of inputs.

    Returns:
        A network of the same modules and tensors under the same names, but with plain layers (see ``graph.plain``);
        and those layers.

    Raises:
        MicronetError: The forward fails, or depends on the values of its inputs.
    """
    check_python(model)
    inputs = as_inputs(model, example)
    recorder, context = _record_eval(model, inputs)
    recorded = GraphModule(recorder.root, recorder.graph)
    differing = [] if recorder.reads else [x for x in _other_inputs(inputs) if not agree_if_taken(model, recorded, x)]
    if recorder.reads or differing:
        line = recorder.reads or parting_line(model, inputs, differing[0])
        raise MicronetError(
            f"forward() depends on the values of its inputs{line}, so the network cannot be traced; write "
            "that part with tensor operations such as torch.where, or move it into a module with is_leaf = True, which "
            "is then left as it is"
        )
    plain = make_plain(recorder.graph, recorder.root, training=False)
    with context():
        trained = _record_training(model, inputs)
    graphs = [each.graph for each in (recorder, trained) if each is not None]
    if recorder.selects_none and (skipped := uncalled(recorder.root, recorder.root, graphs)):
        raise MicronetError(
            f"forward() finds nothing selected in the example input{recorder.selects_none}, and does not call "
            f"{', '.join(skipped[:3])}{' and others' * (len(skipped) > 3)}, so the network cannot be traced; pass an "
            "example of more samples, which reaches all layers"
        )
    if trained is not None:
        plain |= make_plain(trained.graph, trained.root, training=True, only=plain)
    follow_mode(recorder, trained)
    return with_plain(recorder.root, plain, recorder.graph), plain


def _record_eval(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Recorder, Any]:
    """Record a network in eval mode, and return the context to record it again in; MicronetError if it cannot run."""
    try:
        recorder = record(model, inputs)
    except MicronetError:
        raise
    except Exception as error:  # a user's forward may raise anything
        with suppress(Exception):  # it may want Python's own int
            return record(model, inputs, ints=False), nullcontext
        line = error_line(error)
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
        raise MicronetError(
            f"the network cannot run on the example input {shapes}{line}: {first_line(error)}"
        ) from error
    if recorder.reads:  # some code looks at values only while no tracer runs
        with suppress(Exception), _tracing():  # it may refuse to be traced
            if not (other := record(model, inputs)).reads:
                return other, _tracing
    return recorder, nullcontext


def holds(model: nn.Module, recorded: nn.Module, described: list[dict[str, Any]], inputs: tuple[Any, ...]) -> bool:
    """Return True if a record holds for other batches, and one made on inputs of this description for these inputs.

    The latter is made for a restored network; that of a forward which depends on values may hold by chance.
    """
    if not follows_batch(model, recorded, inputs):
        return False
    try:
        again, _ = record_network(model, make_inputs(described))
        return agree(model, again, inputs, rounding=ROUNDING)
    except Exception:  # a user's forward may raise anything
        return False


def trains_more(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Return True if modules with parameters run in training mode only, such as auxiliary heads.

    Copies of the network run. Raises MicronetError if it cannot be copied.
    """
    called: list[set[str]] = []
    for training in (False, True):
        trial, names = copy_model(model).train(training), set[str]()
        for name, module in trial.named_modules():
            if module._parameters and not isinstance(module, torch.jit.ScriptModule):  # that takes no hooks
                module.register_forward_hook(lambda *_, name=name, names=names: names.add(name))
        try:
            with torch.no_grad(), random_kept(model):
                trial(*copied(inputs))
        except Exception:  # a user's forward may raise anything
            return False
        called.append(names)
    return bool(called[1] - called[0])


def describe_example(inputs: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return the shapes and types of inputs as JSON. Raises MicronetError if one is not a tensor, or is too large."""
    if not all(isinstance(x, Tensor) and x.numel() <= LARGEST_INPUT for x in inputs):
        raise MicronetError(
            "a network whose forward() must be traced only supports tensor inputs of at most "
            f"{LARGEST_INPUT:,} elements"
        )
    return describe_inputs(inputs)


def _other_inputs(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield other inputs of the same kinds: values in reverse order, of integers the samples, and floats negated.

    Integers in one column may number other things than those in the next.
    """
    yield tuple(_reversed(x) if isinstance(x, Tensor) else x for x in inputs)
    yield tuple(-x if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _reversed(x: Tensor) -> Tensor:
    return x.flatten().flip(0).view(x.shape) if x.is_floating_point() or x.dim() < 2 else x.flip(0)


def record(
    model: nn.Module, inputs: tuple[Any, ...], *, training: bool = False, into_leaves: bool = False, ints: bool = True
) -> Recorder:
    """Record what a network computes in one mode; nothing is checked. Raises whatever its forward raises.

    ``into_leaves``: whether modules that set ``is_leaf`` are recorded like others. ``ints``: see ``python_sizes``.
    """
    recorder = Recorder(model, training=training, into_leaves=into_leaves)
    with state_kept(model), uncompiled_modules(), torch.no_grad(), random_kept(model):
        model.train(training)
        names = set(dict(model.named_modules()))
        with recorder, recorder.leaves(), python_sizes(model, ints=ints):
            output = model(*recorder.placeholders(inputs))
        recorder.graph.output(recorder.argument(output))
        recorder.find_replaced_buffers()
        if new := dict(model.named_modules()).keys() - names:
            raise UnbuiltError(
                f"forward() builds layers when it first runs ({', '.join(sorted(new))}); run the network once on an "
                "example before passing it to micronet, or build them in __init__"
            )
    recorder.remove_unused()
    return recorder


def _record_training(model: nn.Module, inputs: tuple[Any, ...]) -> Recorder | None:
    """Record a network in training mode; None if its forward fails there or draws random numbers outside torch."""
    twice = tuple(torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x for x in inputs)
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - users draw from them
    try:
        for given in (inputs, twice):  # a batch norm needs several values
            with suppress(Exception):  # a user's forward may raise anything
                recorder = record(model, given, training=True)
                drawn = random.getstate() != python or str(np.random.get_state()) != str(legacy)  # noqa: NPY002
                return None if drawn else recorder
        return None
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _tracing() -> Iterator[None]:
    """Let code that asks whether a tracer runs hear that one does, in this context."""
    jit: Any = torch.jit
    before, jit.is_tracing = jit.is_tracing, lambda: True
    try:
        yield
    finally:
        jit.is_tracing = before
