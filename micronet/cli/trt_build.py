"""``micronet trt-build``: a TensorRT engine from an artifact or an ONNX file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.options import DataOptions, OutputOptions, default_name, of_kind, with_configs
from micronet.quantization.calibration_config import RangeConfig
from micronet.runtimes.config import CodeOptions
from micronet.runtimes.tensorrt.config import BuildConfig

EXAMPLE = "micronet trt-build float.safetensors --precision int8 --calibrator entropy -o int8.engine"


@with_configs
def run(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="An artifact or an .onnx file.",
            show_default=False,
            callback=of_kind(".safetensors", ".onnx"),
        ),
    ],
    *,
    engine: BuildConfig,
    ranges: RangeConfig = RangeConfig(calibrator="entropy"),  # noqa: B008
    data: DataOptions,
    code: CodeOptions,
    output: OutputOptions,
) -> None:
    """Build a TensorRT engine: strongly typed, int8 by explicit Q/DQ.

    TensorRT-RTX builds without a GPU (pip install 'micronet\\[tensorrt-rtx]'); running an engine takes one. int8 of a
    float network calibrates here, on the CPU; --calib-cache also takes the caches that TensorRT wrote up to version
    10. Beside the engine lies a JSON file with its shapes, its layers' datatypes and where it came from.
    """
    from micronet.cli import trt_stage
    from micronet.core.files import check_cache_path, check_output_path, check_writable
    from micronet.runtimes.tensorrt.build import datatypes

    path = output.output or default_name(file, ".engine")
    check_output_path(path, output.force, ".engine")
    check_cache_path(ranges.calib_cache)
    check_writable(engine.timing_cache)
    with console.progress(output.quiet) as progress:
        built = trt_stage.build(trt_stage.Wish(file, engine, ranges, data, code), progress)
    trt_stage.write(built, path)
    about = built.about
    summary: dict[str, Any] = {
        "output": str(path),
        "size_bytes": len(built.data),
        **{key: about[key] for key in ("backend", "version", "precision", "profiles")},
        "multiplies_in": datatypes(about),
    }
    if output.json:
        console.print_json(summary)
    elif not output.quiet:
        counted = ", ".join(f"{count} in {kind}" for kind, count in summary["multiplies_in"].items())
        console.print_line(
            f"wrote {path}  {summary['size_bytes']:,} bytes  {about['backend']} {about['version']}, "
            f"{about['precision']}; layers that multiply: {counted or 'none that the log names'}"
        )
