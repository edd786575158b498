"""The layers of a network, each with its bits, bytes, MACs, latency, precision and distance from the float network."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from micronet.artifact.header import Header, read_header
from micronet.artifact.layers import layer_table
from micronet.core.files import temporary_folder
from micronet.core.metrics import EQUAL_DB
from micronet.evaluation.network import Network
from micronet.models.device import place_input
from micronet.models.modes import eval_mode
from micronet.onnx import graph_view as view
from micronet.onnx.graph_view import GraphView
from micronet.runtimes.onnxruntime import OrtPredictor, run
from micronet.runtimes.torch import EagerPredictor

ROUNDS = 20  # in which ONNX Runtime measures each layer
FUSED = 3  # operators that ONNX Runtime may fuse into a layer
_ADDED = re.compile(r"(_token_\d+|_nchwc)$")  # what ONNX Runtime adds to a name when it replaces a node
_TIMED = "_kernel_time"
OTHERS = "everything else"
DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}  # as torch and numpy call them


class Layer(NamedTuple):
    """A layer; what is not known is None.

    ``snr_db``: of its output, with the float network's as the signal; EQUAL_DB if both are equal. ``precision``: what
    its runtime computes it in.
    """

    name: str
    weight: str
    bits: str
    size_bytes: int | None
    macs: int | None = None
    latency_ms: float | None = None
    snr_db: float | None = None
    precision: str = ""


def layers_of(path: Path, network: Network, first: Network, first_path: Path, inputs: Any) -> list[Layer]:
    """Return a network's layers with stored weights; nothing where its runtime does not name them.

    Args:
        path: The network's file.
        network: The network.
        first: The network that the others are compared with.
        first_path: Its file.
        inputs: Some samples: an array, or a tuple of them if the network takes several inputs.
    """
    try:
        if isinstance(network, EagerPredictor) and path.is_file():
            reference = first if isinstance(first, EagerPredictor) and first_path.is_file() else None
            return _torch_layers(path, network, reference, first_path, inputs)
        if isinstance(network, OrtPredictor):
            return _onnx_layers(network, inputs)
    except Exception:  # of ONNX Runtime or a user's forward; the rest of the page stands without the layers
        return []
    return []


def _torch_layers(
    path: Path, network: EagerPredictor, reference: EagerPredictor | None, first_path: Path, inputs: Any
) -> list[Layer]:
    header, table = read_header(path)
    rows = {row.name: row for row in layer_table(header, table.tensors)}
    modules = dict(network.model.named_modules())
    named = [name for name, row in rows.items() if row.shape.count("x") and name in modules]
    outputs = _outputs(network.model, named, inputs)
    snr = {}
    if reference is not None and reference is not network:
        places = _places(header, read_header(first_path)[0], named)
        wanted = _outputs(reference.model, list(places.values()), inputs)
        snr = {name: _decibels(wanted.get(place), outputs.get(name)) for name, place in places.items()}
    return [
        Layer(
            name,
            rows[name].shape,
            rows[name].quantization or "float32",
            rows[name].size_bytes,
            macs=_macs(modules[name], outputs.get(name)),
            snr_db=snr.get(name),
            precision="float32" if not rows[name].quantization else "integers simulated in float32",
        )
        for name in named
    ]


def _places(header: Header, reference: Header, names: list[str]) -> dict[str, str]:
    """Return, for each layer, the module of the reference whose output is the same: the batch norm folded into it."""
    folded, before = _folded(header), _folded(reference)
    return {name: folded.get(name, name) for name in names if name in folded or name not in before}


def _folded(header: Header) -> dict[str, str]:
    """Return the layers into which batch norms were folded -> their norms."""
    pairs = [record.result.get("pairs", []) for record in header.history if record.stage == "bn-fuse"]
    return {str(layer): str(norm) for each in pairs for layer, norm in each}


def _outputs(model: nn.Module, names: list[str], inputs: Any) -> dict[str, Tensor]:
    """Run a network and return the outputs of modules; of one that is called several times, the last."""
    found: dict[str, Tensor] = {}
    with _catching(model, names, found), eval_mode(model), torch.inference_mode():
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        arrays = inputs if isinstance(inputs, tuple) else (inputs,)
        model(*(place_input(torch.from_numpy(each), device, torch.contiguous_format) for each in arrays))
    return found


@contextmanager
def _catching(model: nn.Module, names: list[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Keep the outputs of modules in ``found`` inside this context."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = output.detach().float().cpu()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _macs(layer: nn.Module, output: Tensor | None) -> int | None:
    """Return a layer's multiply-accumulates for one sample: those for each number that it computes."""
    weight = getattr(layer, "weight", None)
    if output is None or not isinstance(weight, Tensor) or weight.dim() < 2 or not isinstance(output, Tensor):
        return None
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return (
            output[0].numel() // math.prod(layer.stride) * weight.shape[0] * math.prod(weight.shape[2:]) // layer.groups
        )
    return output[0].numel() * math.prod(weight.shape[1:])


def _decibels(signal: Tensor | None, output: Tensor | None) -> float | None:
    if signal is None or output is None or signal.shape != output.shape:
        return None
    noise = float((output - signal).double().square().sum())
    power = float(signal.double().square().sum())
    if not noise:
        return EQUAL_DB
    return 10 * math.log10(power / noise) if power else None


def _onnx_layers(network: OrtPredictor, inputs: Any) -> list[Layer]:
    graph, counted = GraphView(network.proto), network.integer_layers()
    reasons: Mapping[str, str] = {} if counted is None else counted["float"]
    times = _times(network.proto, inputs)
    rows = []
    for layer in graph.layers:
        name, weight = view.layer_name(layer.node), layer.weight
        timed = next((each for each in _timed_names(layer.node) if each in times), None)
        left = "float32" if counted is None else reasons.get(name)
        precision = "float32" if counted is None else "int8" if left is None else f"float32: {left}"
        rows.append(
            Layer(
                name,
                "x".join(map(str, weight.shape)),
                f"weight {DTYPES.get(weight.dtype.name, weight.dtype.name.lower())}",
                weight.nbytes,
                latency_ms=None if timed is None else times.pop(timed),
                precision=precision,
            )
        )
    if times:
        rows.append(Layer(OTHERS, "", "", None, latency_ms=sum(times.values())))
    return rows


def _timed_names(node: ir.Node) -> Iterator[str]:
    """Yield the names under which ONNX Runtime may time a node: its own, or the values of what it fuses into it."""
    yield node.name or ""
    for _ in range(FUSED):
        value = node.outputs[0]
        yield value.name or ""
        if len(value.consumers()) != 1:
            return
        node = value.consumers()[0]


def _times(proto: onnx.ModelProto, inputs: Any) -> dict[str, float]:
    """Return the milliseconds that ONNX Runtime spends in each node for one sample, with one thread: medians."""
    one = tuple(each[:1] for each in inputs) if isinstance(inputs, tuple) else inputs[:1]
    with temporary_folder() as folder:
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling, settings.intra_op_num_threads, settings.log_severity_level = True, 1, 4
        settings.profile_file_prefix = str(folder / "profile")
        session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, ["CPUExecutionProvider"])
        for _ in range(ROUNDS):
            run(session, one)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent = defaultdict[str, list[float]](list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_TIMED):
            spent[_ADDED.sub("", event["name"].removesuffix(_TIMED))].append(event["dur"] / 1000)
    return {name: float(np.round(median(values), 5)) for name, values in spent.items()}
