"""Other people's networks, quantized to int8 by us and by ONNX Runtime's own ``quantize_static``, side by side.

``python scripts/export_zoo.py --foreign`` runs it. Weights are random; batch norms get the statistics of the
calibration inputs, which are random too, but smooth like images. Both get the same float ONNX file's network and the
same inputs; ONNX Runtime's quantizer runs at its defaults. Times are medians of interleaved runs with one thread. Each
network is measured in a process of its own: whatever stops one is a row with the reason. Rows are stored as they end.
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
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn
from torch.nn import functional as F

import micronet
from micronet.onnx.export import to_onnx
from micronet.onnx.integers import count_integer_layers
from micronet.quantization.recovery import reestimate_norms

BATCHES, BATCH = 4, 8  # to calibrate on, and as many others to judge by
TIME_LIMIT = 900  # seconds per network
MARGIN_DB, MARGIN_TIME = 0.5, 1.1  # what we may lose against ONNX Runtime's quantizer


def _timm(name: str, size: int = 96, **options: Any) -> tuple[Callable[[], nn.Module], int]:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=10, **options)
        return made

    return build, size


def _torchvision(name: str, size: int = 96, **options: Any) -> tuple[Callable[[], nn.Module], int]:
    def build() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        for parameter in made.parameters():  # the head of vit starts at zero
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return made

    return build, size


def _segmentation(name: str) -> tuple[Callable[[], nn.Module], int]:
    class First(nn.Module):
        """A segmentation network of torchvision's that returns its main output alone."""

        def __init__(self) -> None:
            super().__init__()
            self.network = _torchvision(name, weights_backbone=None, num_classes=21)[0]()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.network(x)["out"]
            return out

    return First, 96


def _yolo(name: str) -> tuple[Callable[[], nn.Module], int]:
    def build() -> nn.Module:
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel(f"{name}.yaml", nc=10, verbose=False)
        model.model[-1].export, model.model[-1].format = True, "onnx"
        return model

    return build, 128


def _smp(kind: str, encoder: str) -> tuple[Callable[[], nn.Module], int]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        made: nn.Module = getattr(smp, kind)(encoder, encoder_weights=None, classes=3)
        return made

    return build, 64


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"timm {name}": _timm(name)
        for name in (
            "mobilenetv4_conv_small", "repvgg_a0", "lcnet_050", "ese_vovnet19b_dw", "ese_vovnet39b", "efficientnet_b0",
            "efficientnet_lite0", "tf_efficientnet_lite0", "mobilevit_xxs", "convnext_atto", "regnetx_002",
            "regnety_002", "ghostnet_050", "resnet18", "densenet121", "mobileone_s0", "dla34", "hrnet_w18_small",
            "mnasnet_050",
        )
    },
    "timm deit_tiny_patch16_224": _timm("deit_tiny_patch16_224", img_size=96),
    "timm vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=96),
    "timm swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", size=112, img_size=112),
    **{
        f"torchvision {name}": _torchvision(name, num_classes=10)
        for name in ("mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x1_0", "squeezenet1_1")
    },
    "torchvision vit_b_32": _torchvision("vit_b_32", num_classes=10, image_size=96),
    "torchvision lraspp_mobilenet_v3_large": _segmentation("lraspp_mobilenet_v3_large"),
    "ultralytics yolov8n": _yolo("yolov8n"),
    "smp Unet resnet18": _smp("Unet", "resnet18"),
    "smp Unet mobilenet_v2": _smp("Unet", "mobilenet_v2"),
}  # fmt: skip


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


def measure(build: Callable[[], nn.Module], size: int, seconds: float) -> Row:
    """Quantize a network in both ways and compare; ``seconds``: how long to time, 0 for not at all."""
    torch.manual_seed(0)
    batches, held_out = ([_images(size) for _ in range(BATCHES)] for _ in range(2))
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


def _images(size: int) -> Tensor:
    """Return random images that are smooth like photographs, (BATCH, 3, size, size)."""
    coarse = sum(F.interpolate(torch.randn(BATCH, 3, n, n), (size, size), mode="bilinear") for n in (2, 5, 12, size))
    return coarse * 0.5  # type: ignore[no-any-return]


def _outputs(session: onnxruntime.InferenceSession, name: str, batches: list[Tensor]) -> list[Any]:
    """Return the outputs for all batches, one array each."""
    each = zip(*(session.run(None, {name: batch.numpy()}) for batch in batches), strict=True)
    return [np.concatenate(parts).astype(np.float64) for parts in each]


def _quantize_static(proto: onnx.ModelProto, batches: list[Tensor]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        quantize_static(source, target, _Reader(proto.graph.input[0].name, batches))
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
