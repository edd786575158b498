"""Compute inner tensors of an ONNX model, and nothing that they do not depend on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from micronet.errors import MicronetError
from micronet.onnx.feeds import Feed
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnx_batches import reason
from micronet.runtimes.onnxruntime import open_session

Compute = Callable[[Feed], Sequence[NDArray[np.generic]]]


def session_for(proto: onnx.ModelProto, names: Sequence[str]) -> Compute:
    """Return a function that computes some tensors of a model, at least one, from its inputs."""
    model = ir.from_proto(proto)
    values = {str(value.name): value for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    model.graph.outputs[:] = [values[name] for name in names]
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    session = open_session(ir.to_proto(model).SerializeToString(), RuntimeOptions(), "the model")
    given = [entry.name for entry in session.get_inputs()]
    return lambda feed: run_feed(session, {name: feed[name] for name in given})


def one_sample(session: Any, feed: Feed) -> Feed:
    """Return the first sample of a feed, or all of it if its first axis is fixed or is not a batch."""
    entries = {entry.name: entry.shape[:1] for entry in session.get_inputs()}
    one = {name: x if isinstance(next(iter(entries[name]), 0), int) else x[:1] for name, x in feed.items()}
    try:
        session.run(None, one)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return feed
    return one


def run_feed(session: object, feed: Feed) -> Sequence[NDArray[np.generic]]:
    """Return a session's outputs for one feed; MicronetError if ONNX Runtime rejects it."""
    try:
        return session.run(None, feed)  # type: ignore[attr-defined, no-any-return]  # ONNX Runtime has no types
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in feed.items())
        hint = "; axes that have one name in the file must have one size" if "Shape mismatch" in str(error) else ""
        raise MicronetError(f"ONNX Runtime rejected the inputs {shapes}: {reason(error)}{hint}") from error
