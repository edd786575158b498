"""Other people's networks, quantized to int8 by us and by ONNX Runtime's own ``quantize_static``, side by side.

``python scripts/export_zoo.py --foreign`` runs it. Weights are random; batch norms get the statistics of the
calibration inputs, which are random too, but smooth if they are images. Both get the same float ONNX file's network and
the same inputs; ONNX Runtime's quantizer runs at its defaults. Times are medians of interleaved runs with one thread.
Each network is measured in a process of its own: whatever stops one is a row with the reason. Rows are stored as they
end.
"""

import copy
import json
import logging
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from foreign_networks import NETWORKS
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn

import micronet
from micronet.onnx.export import to_onnx
from micronet.onnx.integers import count_integer_layers
from micronet.quantization.recovery import reestimate_norms

BATCHES = 4  # to calibrate on, and as many others to judge by
TIME_LIMIT = 900  # seconds per network
MARGIN_DB, MARGIN_TIME = 0.5, 1.1  # what we may lose against ONNX Runtime's quantizer


@dataclass
class Row:
    """What was measured of a network: milliseconds, decibels and operators, ours and ONNX Runtime's; or what failed."""

    float_ms: float = math.nan
    ours_ms: float = math.nan
    theirs_ms: float = math.nan
    ours_db: float = math.nan
    theirs_db: float = math.nan
    ours_integer: str = "-"
    theirs_integer: str = "-"
    failed: str | None = None

    def __str__(self) -> str:
        if self.failed is not None:
            return self.failed
        times = f"{self.float_ms:.2f} | {self.ours_ms:.2f} | {self.theirs_ms:.2f}"
        ratios = f"{self.ours_ms / self.float_ms:.2f} | {self.ours_ms / self.theirs_ms:.2f}"
        return (
            f"{times} | {ratios} | {self.ours_db:.1f} | {self.theirs_db:.1f} | {self.ours_integer} | "
            f"{self.theirs_integer}"
        )


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, name: str, batches: Iterable[Tensor]) -> None:
        self._feeds = ({name: image[None].numpy()} for batch in batches for image in batch)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def measure(build: Callable[[], nn.Module], draw: Callable[[], Tensor], seconds: float) -> Row:
    """Quantize a network in both ways and compare.

    ``draw`` returns a batch of inputs; ``seconds``: how long to time, 0 for not at all.
    """
    torch.manual_seed(0)
    batches, held_out = ([draw() for _ in range(BATCHES)] for _ in range(2))
    model = build().eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        reestimate_norms(model, batches)
    example = batches[0][:2]
    floating = micronet.export_onnx(copy.deepcopy(model), example_input=example)
    ours = to_onnx(micronet.quantize(model, mode="ptq", data=batches), example)  # unchecked: classes mean nothing here
    theirs = _quantize_static(floating, batches)
    sessions = [_session(proto) for proto in (floating, ours, theirs)]
    name = sessions[0].get_inputs()[0].name
    expected, *others = (_outputs(session, name, held_out) for session in sessions)
    image = {name: held_out[0][:1].numpy()}
    times = list(_times(sessions, image, seconds)) if seconds else [math.nan] * len(sessions)
    decibels = [_sqnr(expected, outputs) for outputs in others]
    return Row(*times, *decibels, *map(_integers, (ours, theirs)))


def _outputs(session: onnxruntime.InferenceSession, name: str, batches: list[Tensor]) -> list[Any]:
    """Return the outputs for all batches, one array each."""
    each = zip(*(session.run(None, {name: batch.numpy()}) for batch in batches), strict=True)
    return [np.concatenate(parts).astype(np.float64) for parts in each]


def _quantize_static(proto: onnx.ModelProto, batches: list[Tensor]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        try:
            quantize_static(source, target, _Reader(proto.graph.input[0].name, batches))
        except RuntimeError as error:
            raise RuntimeError(f"ONNX Runtime's quantizer: {error}") from error
        return onnx.load(target)


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _times(sessions: list[onnxruntime.InferenceSession], feed: dict[str, Any], seconds: float) -> Iterator[float]:
    """Yield the median milliseconds of each session, run in turns."""
    taken: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for session, found in zip(sessions, taken, strict=True):
            session.run(None, feed)  # into the caches
            start = time.process_time()  # the sessions have one thread; other processes share the processor
            session.run(None, feed)
            found.append((time.process_time() - start) * 1000)
    return map(median, taken)


def _sqnr(expected: list[Any], outputs: list[Any]) -> float:
    """Return the least signal-to-quantization-noise ratio of the outputs in dB."""
    ratios = (
        np.square(a).sum() / max(np.square(a - b).sum(), 1e-30)
        for a, b in zip(expected, outputs, strict=True)
        if a.any()
    )
    return 10 * math.log10(min(ratios))


def _integers(proto: onnx.ModelProto) -> str:
    counts = count_integer_layers(proto)
    return "-" if counts is None else " ".join(
        f"{counts[noun]['integer']}/{counts[noun]['all']}" for noun in ("convolutions", "linear")
    )  # fmt: skip


def _measure_apart(name: str, seconds: float) -> Row:
    """Measure a network in a process of its own, which ends at the time limit."""
    context = multiprocessing.get_context("fork")  # everything is imported already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(sender, name, seconds))
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv() if receiver.poll(TIME_LIMIT + seconds) else Row(failed=f"over {TIME_LIMIT} s")
    except EOFError:
        process.join()
        row = Row(failed=f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return row


def _send_row(sender: Connection, name: str, seconds: float) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        sender.send(measure(*NETWORKS[name], seconds))
    except ModuleNotFoundError as error:
        sender.send(Row(failed=f"not installed: {error}"))
    except Exception as error:  # the table goes on
        sender.send(Row(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def print_table(chosen: list[str], seconds: float, file: Path | None) -> None:
    """Print one row per network, and how many reach the aims.

    Args:
        chosen: Parts of the networks' names, or nothing for all.
        seconds: How long to time each network, 0 for not at all.
        file: Where rows are stored as they end, one JSON object per line; those in it are not measured again, except
            failures. None for nowhere.
    """
    stored = file.read_text().splitlines() if file is not None and file.exists() else []
    known = {name: Row(**row) for name, row in map(json.loads, stored)}
    known = {name: row for name, row in known.items() if row.failed is None}
    print("| network | float ms | ours ms | ONNX Runtime's ms | ours/float | ours/theirs | SQNR ours dB | theirs dB | "
          "integer convolutions, products: ours | theirs |")  # fmt: skip
    print("| --- |" + " ---: |" * 9)
    rows = []
    for name in NETWORKS:
        if chosen and not any(part in name for part in chosen):
            continue
        row = known[name] if name in known else _measure_apart(name, seconds)
        if name not in known and file is not None:
            with file.open("a") as out:
                out.write(json.dumps([name, asdict(row)]) + "\n")
        rows.append(row)
        print(f"| {name} | {row} |", flush=True)
    done = [row for row in rows if row.failed is None]
    aims = {
        "measured": len(done),
        "faster than float": sum(row.ours_ms < row.float_ms for row in done),
        f"within {MARGIN_TIME} of ONNX Runtime's time": sum(row.ours_ms <= MARGIN_TIME * row.theirs_ms for row in done),
        f"within {MARGIN_DB} dB of its SQNR": sum(row.ours_db >= row.theirs_db - MARGIN_DB for row in done),
    }
    print(f"\nOf {len(rows)} networks: " + ", ".join(f"{number} {aim}" for aim, number in aims.items()))
