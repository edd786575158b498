"""The settings of an ONNX export. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal

from micronet.core.config import Settings, setting
from micronet.errors import MicronetError, unknown
from micronet.quantization.config import QuantConfig

OLDEST_OPSET, NEWEST_OPSET = 18, 23  # the oldest that torch's exporter writes, the newest that ONNX Runtime 1.23 reads
INT4_OPSET = 21
AXES = {"batch": 0, "height": 2, "width": 3}


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
        "batch", "Dynamic axes: a comma-separated list of batch, height and width, or none.", basic=True
    )
    precision: Literal["fp32", "fp16"] = setting(
        "fp32", "Precision of float networks. fp16 halves the file size; inputs and outputs remain float32.", basic=True
    )
    int4_storage: bool = setting(
        False, "Store weights of 4 bits or fewer two per byte; the file is smaller, but slower in ONNX Runtime."
    )
    embed_preprocessing: bool = setting(
        False, "Accept 8-bit pixels as input, with the normalization built into the file."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.free_axes:
            if name == "none":
                raise MicronetError("--dynamic none cannot be combined with other axes; drop one or the other")
            if name not in AXES:
                raise unknown("axis for --dynamic:", name, [*AXES, "none"])
        if len(set(self.free_axes)) < len(self.free_axes):
            raise MicronetError(f"--dynamic {self.dynamic} lists an axis twice; list each axis once")
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


def check_quantization(config: QuantConfig) -> None:
    """Raise MicronetError for settings that post-training quantization of an ONNX file does not support."""
    possible = QuantConfig(w_bits=config.w_bits, q_type=config.q_type, q_level=config.q_level, a_sign=config.a_sign)
    if config.w_bits not in (7, 8) or config != possible:
        raise MicronetError(
            "ONNX files only support --w-bits 7 or 8, --a-bits 8, --q-type, --q-level and --a-sign; for other "
            "settings, quantize the artifact that the file was exported from"
        )
    if config.a_sign == "signed" and config.q_type != "sym":
        raise MicronetError("--a-sign signed requires --q-type sym; add it")
