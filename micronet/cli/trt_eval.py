"""``micronet trt-eval``: a TensorRT engine's accuracy, agreement with the ONNX file, latency and throughput."""

from pathlib import Path
from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions, of_kind, with_configs
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions

EXAMPLE = "micronet trt-eval int8.engine --onnx int8.onnx --batch-sizes 1,8,32"
COLUMNS = ("input", "p50", "p95", "p99", "GPU alone", "images/s")


@with_configs
def run(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="ENGINE", help="An .engine of trt-build.", show_default=False, callback=of_kind(".engine")
        ),
    ],
    onnx: Annotated[Path | None, typer.Option(help="Model to agree with, run by ONNX Runtime on the CPU.")] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Batches to time; larger than the engine's run in parts.")
    ] = "1,8,32",
    folder: Annotated[
        Path | None, typer.Option("--segmentation", help="Folder with images/NAME.jpg and labels/NAME.png.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Segmentation: shorter sides, or HxW, to average scores over; default: the engine's own."),
    ] = None,
    *,
    data: DataOptions,
    runtime: RuntimeOptions,
    report: ReportOptions,
) -> None:
    """Run a TensorRT engine on an NVIDIA GPU: accuracy or mean IoU, latency and images a second by batch size.

    Needs the library that built the engine, in the same version, and pycuda. Untried on hardware so far.
    """
    if folder is None and sizes is not None:
        raise MicronetError("--sizes is for --segmentation FOLDER; for classes there is --image-size")
    if folder is not None and (data.data is not None or data.image_size is not None):
        raise MicronetError("--segmentation brings its own images; leave --data and --image-size out, or say --sizes")
    from micronet.cli import trt_measure
    from micronet.runtimes.tensorrt.segmentation import parse_sizes
    from micronet.runtimes.tensorrt.timing import parse_batch_sizes

    wish = trt_measure.Wish(
        file, onnx, parse_batch_sizes(batch_sizes), folder, parse_sizes(sizes) if sizes else [], data, runtime
    )
    with console.progress(report.quiet) as progress:
        figures = trt_measure.measure(wish, progress)
    if report.json:
        console.print_json(figures)
        return
    for label, value in _lines(figures):
        console.print_line(f"{label:<20}{value}")
    console.print_table(COLUMNS, [_cells(timing) for timing in figures["timings"]])


def _lines(figures: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("engine", f"{figures['backend']} {figures['version']}, {figures['precision']}"),
        ("GPU", figures["machine"]["gpu"]),
        ("file", f"{figures['size_bytes']:,} bytes"),
    ]
    if "accuracy" in figures:
        lines.append(("accuracy", f"{figures['accuracy']:.2%} of {figures['images']:,} images"))
        lines.append(("loss", f"{figures['loss']:.4f}"))
    else:
        lines.append(("pixel accuracy", f"{figures['pixel_accuracy']:.2%} of {figures['images']:,} images"))
        lines.append(("mean IoU", f"{figures['mean_iou']:.2%}"))
    if figures["agreement"] is not None:
        lines.append(("agrees with ONNX", f"{figures['agreement']:.2%}"))
    return lines


def _cells(timing: dict[str, Any]) -> list[str]:
    times = [f"{timing[key]:.2f} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "device_ms")]
    return ["x".join(map(str, timing["shape"])), *times, f"{timing['images_per_second']:,.0f}"]
