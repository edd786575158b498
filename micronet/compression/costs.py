"""What layers cost: their latency, each measured alone in the chosen runtime and kept in a table."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from micronet.compression.layers import Shape
from micronet.compression.onnx_layer import Form, make_layer
from micronet.core.files import temporary_folder, write_bytes
from micronet.core.machine import processor_name, usable_cores
from micronet.core.parse import parse_json, read_text
from micronet.core.progress import Progress, Silent
from micronet.evaluation.latency import time_call
from micronet.evaluation.network import Predictor
from micronet.packed.file_format import to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network

FILE = "costs.json"
PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "packed": "numba"}  # that layers can be timed in
TURN_SECONDS, LEAST_CALLS, MOST_CALLS = 0.01, 5, 200  # of each layer in each pass
BURST_SECONDS = 0.003  # of calls in a row
PASSES = 3  # at several moments, since other work may slow all calls of one
LAYERS = 3  # of a convolution, for the difference to one
AT_ONCE = 16  # layers that are timed in turns
Key = tuple[Shape, Form]
Opened = tuple[Predictor, NDArray[Any]] | None  # a layer and its input
NOTHING: Key = Shape("Linear", 1, 1), "float"


@dataclass(frozen=True)
class Deployment:
    """Where a network is to run: the runtime, the samples in a call, threads and device."""

    runtime: str
    batch: int = 1
    threads: int | None = None
    device: str | None = None

    @property
    def options(self) -> RuntimeOptions:
        """The options to open the network's file with."""
        onnx_runtime = "openvino" if self.runtime == "openvino" else None
        return RuntimeOptions(runtime=onnx_runtime, threads=self.threads, device=self.device)

    def check(self, path: Path) -> None:
        """Raise FailedError, which calls the network ``path``, if this machine has no GPU that the runtime needs."""
        if self.runtime == "tensorrt":
            from micronet.runtimes.tensorrt.library import open_gpu

            open_gpu(0, path)

    @property
    def computes_in_one_thread(self) -> bool:
        """Whether a call's work is the CPU time of this process."""
        return self.threads == 1 and self.runtime != "tensorrt"

    @property
    def header(self) -> dict[str, Any]:
        """What measured times depend on, besides the layer: the machine, the runtime and how it runs."""
        try:
            found = version(PACKAGES.get(self.runtime, ""))
        except (PackageNotFoundError, ValueError):
            found = ""
        about = {"runtime": self.runtime, "version": found, "batch": self.batch, "threads": self.threads}
        return {**about, "processor": processor_name(), "cores": usable_cores()}


@dataclass
class CostTable:
    """Milliseconds of layers by shape and form, kept in a file for the same machine and runtime.

    Attributes:
        deployment: Where the layers run.
        path: The file.
        seconds: How long layers may be timed for in this run; later ones are estimated by their multiply-accumulates.
        known: What was measured, less a call that computes nothing, timed in turns with the layer; None of layers that
            the runtime cannot run alone.
        call_ms: Milliseconds of a call that computes nothing, the least that was seen.
    """

    deployment: Deployment
    path: Path
    seconds: float
    progress: Progress = field(default_factory=Silent)
    known: dict[str, float | None] = field(default_factory=dict)
    call_ms: float = math.inf

    @classmethod
    def open(cls, deployment: Deployment, folder: Path, seconds: float, progress: Progress) -> "CostTable":
        """Read the table in a folder; it is empty if there is none, or it is another machine's or runtime's."""
        table = cls(deployment, folder / FILE, seconds, progress)
        try:
            stored = parse_json(read_text(table.path))
            if stored["header"] == deployment.header:
                table.known, table.call_ms = dict(stored["net_ms"]), float(stored["call_ms"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return table

    def measure(self, wanted: Iterable[Key]) -> None:
        """Time the layers that are not known yet, several in turns, and write the table."""
        names = {_name(*key): key for key in wanted}
        missing = [key for name, key in names.items() if name not in self.known]
        start, before = time.monotonic(), len(self.known)
        for first in range(0, len(missing), AT_ONCE):
            if time.monotonic() - start > self.seconds:
                break
            part = missing[first : first + AT_ONCE]
            call, times = time_layers(part, self.deployment)
            self.call_ms = min(self.call_ms, call)
            self.known |= {_name(*key): ms for key, ms in zip(part, times, strict=True)}
            self.progress.step("timing layers", min(first + AT_ONCE, len(missing)), len(missing))
        self.seconds -= time.monotonic() - start
        if len(self.known) > before:
            content = {"header": self.deployment.header, "call_ms": self.call_ms, "net_ms": self.known}
            write_bytes(self.path, f"{json.dumps(content, indent=1)}\n".encode())

    def ms(self, shape: Shape, form: Form) -> float | None:
        """Return the milliseconds of a layer, less those of a call, or None if it was not measured."""
        return self.known.get(_name(shape, form))


def _name(shape: Shape, form: Form) -> str:
    return json.dumps([form, *astuple(shape)], separators=(",", ":"))


def time_layers(keys: Sequence[Key], deployment: Deployment) -> tuple[float, list[float | None]]:
    """Return the milliseconds of a call that computes nothing, and of layers less that; None if the runtime refuses.

    A convolution is the difference between three of them, which read the same input, and one: runtimes reorder the
    values of a convolution alone before and after it, which inside a network they do not. The results are added; in
    integers so are those of the one, since there the sums cost time of their own. Each time is the least of many calls
    in turns, at several moments, so that other work on the machine hardly changes their order. At each moment, the
    networks are opened anew, since the memory of one may have been laid out badly.
    """
    passes = [_times_once(keys, deployment) for _ in range(PASSES)]
    (call, *least), (_, *more) = (
        [None if None in times else min(times) for times in zip(*some, strict=True)]
        for some in zip(*passes, strict=True)
    )
    call = call or 0.0
    net = [
        None if single is None else single - call if triple is None else (triple - single) / (LAYERS - 1)
        for single, triple in zip(least, more, strict=True)
    ]
    return round(call, 5), [None if each is None else round(max(0.0, each), 5) for each in net]


def _times_once(keys: Sequence[Key], deployment: Deployment) -> tuple[list[float | None], list[float | None]]:
    """Return the milliseconds of nothing and of one of each layer, and of several of each; see ``time_layers``."""
    one = [_opened(*NOTHING, deployment)]
    several: list[Opened] = [None]
    for shape, form in keys:
        differs = shape.kind != "Linear" and form in ("float", "int8")
        one.append(_opened(shape, form, deployment, terms=LAYERS if differs and form == "int8" else 1))
        several.append(_opened(shape, form, deployment, LAYERS, LAYERS) if differs else None)
    found = [each for each in (*one, *several) if each is not None]
    times = iter(fastest_ms(found, TURN_SECONDS, one_thread=deployment.computes_in_one_thread))
    single, triple = ([None if each is None else next(times) for each in some] for some in (one, several))
    return single, triple


def fastest_ms(
    runs: Sequence[tuple[Predictor, NDArray[Any] | tuple[Any, ...]]],
    seconds: float,
    most: int | None = MOST_CALLS,
    *,
    one_thread: bool = False,
) -> list[float]:
    """Return the milliseconds of the fastest call of each predictor on its input; they run in turns.

    A turn has several short calls: the first finds the caches filled by another network, which the time of a network
    that runs alone must not depend on.

    Args:
        runs: Predictors and their inputs.
        seconds: How long each runs, at least; a few calls in any case.
        most: Calls that are enough, however short they are.
        one_thread: Whether they compute in one thread. Then the CPU time of the process is theirs, and where that is
            shorter, other work has interrupted a call: on a busy machine, every call that is longer than a time slice.
    """
    least, spent = [float("inf")] * len(runs), [0.0] * len(runs)
    calls, limit = [0] * len(runs), math.inf if most is None else most
    for predict, given in runs:
        predict(given)
    while runs and any((s < seconds and c < limit) or c < LEAST_CALLS for s, c in zip(spent, calls, strict=True)):
        for index, (predict, given) in enumerate(runs):
            if calls[index] >= LEAST_CALLS and (spent[index] >= seconds or calls[index] >= limit):
                continue
            shortest, took, number = _turn(predict, given, one_thread)
            least[index] = min(least[index], shortest)
            spent[index] += took
            calls[index] += number
    return [1000 * each for each in least]


def _turn(predict: Predictor, given: Any, one_thread: bool) -> tuple[float, float, int]:
    """Call a predictor for some milliseconds; return the seconds of the shortest call and of all, and their number."""
    least, spent, calls = math.inf, 0.0, 0
    while spent < BURST_SECONDS:
        start = time.perf_counter()
        least = min(least, time_call(predict, given, one_thread=one_thread))
        spent, calls = spent + time.perf_counter() - start, calls + 1
    return least, spent, calls


def _opened(shape: Shape, form: Form, deployment: Deployment, layers: int = 1, terms: int = 1) -> Opened:
    """Open a layer in the runtime; return None if that refuses it, or runs no single layers."""
    if deployment.runtime not in PACKAGES:
        return None
    try:
        proto, sample = make_layer(shape, form, deployment.batch, layers=layers, terms=terms)
        with temporary_folder() as folder:
            network = open_network(_write(proto, folder, deployment.runtime), deployment.options)
        network(sample)
    except Exception:  # whatever a runtime raises; its layers are then estimated
        return None
    return network, sample


def _write(proto: onnx.ModelProto, folder: Path, runtime: str) -> Path:
    """Write a layer as the file that a runtime opens."""
    if runtime == "packed":
        path = folder / "layer.packed"
        path.write_bytes(to_bytes(pack_model(proto)))
    else:
        path = folder / "layer.onnx"
        path.write_bytes(proto.SerializeToString())
    return path
