"""The settings of an ONNX export. No torch here, so ``--help`` stays fast."""

import math
from dataclasses import dataclass
from typing import Literal

from micronet.core.config import Settings, setting
from micronet.errors import MicronetError, unknown
from micronet.quantization.config import INTEGER_BITS, QuantConfig

OLDEST_OPSET, NEWEST_OPSET = 18, 23  # the oldest that torch's exporter writes, the newest that ONNX Runtime 1.23 reads
INT4_OPSET = 21
AXES = {"batch": 0, "height": 2, "width": 3}
MOST_AXES = 8  # of an input


@dataclass(frozen=True)
class ExportConfig(Settings):
    """ONNX export."""

    target: Literal["ort", "tensorrt"] = setting(
        "ort",
        "Target runtime: ONNX Runtime (unsigned activations) or TensorRT (signed activations, zero point 0).",
        basic=True,
    )
    opset: int = setting(21, "ONNX operator set version, 18 to 23.", low=OLDEST_OPSET, high=NEWEST_OPSET, basic=True)
    dynamic: str = setting(
        "batch",
        "Dynamic axes: a comma-separated list of batch, height and width, or none. A number is an axis of every input "
        "that has it: 1 for the length of (batch, length).",
        basic=True,
    )
    precision: Literal["fp32", "fp16"] = setting(
        "fp32", "Precision of float networks. fp16 halves the file size; inputs and outputs remain float32.", basic=True
    )
    low_bit_storage: bool = setting(
        False,
        "Store weights of fewer than 8 bits in about as many, unpacked when the file is loaded. The outputs and the "
        "speed stay the same.",
    )
    int4_storage: bool = setting(
        False,
        "Store weights of 4 bits or fewer as ONNX's INT4, which is slower in ONNX Runtime; --low-bit-storage is not.",
    )
    embed_preprocessing: bool = setting(
        False, "Accept 8-bit pixels as input, with the normalization built into the file."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.free_axes:
            if name == "none":
                raise MicronetError("--dynamic none cannot be combined with axis names; drop one or the other")
            if name not in AXES and not (name.isdecimal() and 0 < int(name) < MOST_AXES):
                raise unknown("axis for --dynamic:", name, [*AXES, "1", "2", "3", "none"])
        if len(self.axes) < len(self.free_axes):
            raise MicronetError(f"--dynamic {self.dynamic} lists an axis twice; list each axis once")
        if self.low_bit_storage and self.int4_storage:
            raise MicronetError("--low-bit-storage and --int4-storage cannot be combined; drop --int4-storage")
        if self.low_bit_storage and self.target == "tensorrt":
            raise MicronetError("TensorRT does not unpack weights; drop --low-bit-storage to store them as int8")
        if self.int4_storage and self.opset < INT4_OPSET:
            raise MicronetError(f"--int4-storage needs --opset {INT4_OPSET} or later")
        if self.int4_storage and self.target == "tensorrt":
            raise MicronetError(
                "TensorRT does not support 4-bit weights with 8-bit activations; drop --int4-storage to store the "
                "weights as int8"
            )

    @property
    def free_axes(self) -> list[str]:
        """The names of the dynamic axes."""
        return [] if self.dynamic == "none" else [part.strip() for part in self.dynamic.split(",")]

    @property
    def axes(self) -> dict[int, str]:
        """The dynamic axes and their names in the file."""
        named = {AXES[name]: name for name in self.free_axes if name in AXES}
        return {int(name): f"axis{name}" for name in self.free_axes if name not in AXES} | named


@dataclass(frozen=True)
class InputConfig(Settings):
    """Inputs of an ONNX file."""

    mean: str | None = setting(
        None, "Per-channel mean of an ONNX file's images (pixels are scaled to 0..1), for example 0.485,0.456,0.406."
    )
    std: str | None = setting(None, "Per-channel standard deviation of an ONNX file's images; use with --mean.")
    input_shape: str | None = setting(
        None, "Shape of an ONNX file's images if its sizes are dynamic, for example 3,48,320.", metavar="C,H,W"
    )
    layout: Literal["auto", "nchw", "nhwc"] = setting(
        "auto", "Axis order of an ONNX file's images. auto: inferred from its fixed sizes."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mean is None) != (self.std is None):
            raise MicronetError("--mean and --std must be used together; pass both")
        _ = self.normalization, self.shape

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """The mean and standard deviation per channel; both empty if they are not given."""
        mean, std = (_numbers(text or "", name) for name, text in (("--mean", self.mean), ("--std", self.std)))
        if len(mean) != len(std) or any(value <= 0 for value in std):
            raise MicronetError("--mean and --std take one number per channel; those of --std must be positive")
        return mean, std

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The channels, height and width given."""
        if self.input_shape is None:
            return None
        parts = self.input_shape.split(",")
        if len(parts) != len(AXES) or not all(part.strip().isdigit() and 0 < int(part) < 2**15 for part in parts):
            raise MicronetError(
                f"--input-shape is {self.input_shape!r}; expected channels,height,width, for example 3,224,224"
            )
        return int(parts[0]), int(parts[1]), int(parts[2])


def _numbers(text: str, name: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise MicronetError(f"{name} is {text!r}; expected one number per channel, for example 0.485,0.456,0.406")
    return found


def check_quantization(config: QuantConfig) -> None:
    """Raise MicronetError for settings that post-training quantization of an ONNX file does not support."""
    possible = QuantConfig(
        w_bits=config.w_bits,
        q_type=config.q_type,
        q_level=config.q_level,
        a_sign=config.a_sign,
        first_last=config.first_last,
        exclude=config.exclude,
    )
    if config.w_bits not in (7, 8) or config != possible:
        raise MicronetError(
            "ONNX files only support --w-bits 7 or 8, --a-bits 8, --q-type, --q-level, --a-sign, --exclude and "
            "--first-last; for other settings, quantize the artifact that the file was exported from"
        )
    if config.w_bits != INTEGER_BITS and config.first_last in ("8bit", "8bit-input"):
        raise MicronetError(
            f"all layers of an ONNX file have the same bits, so --first-last {config.first_last} would change nothing "
            f"with --w-bits {config.w_bits}; use --first-last same or float"
        )
    if config.a_sign == "signed" and config.q_type == "asym":
        raise MicronetError("--a-sign signed requires --q-type sym; add it")
