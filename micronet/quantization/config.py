"""The settings of quantization, calibration and accuracy recovery. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from micronet.core.config import Settings, flag, setting
from micronet.errors import MicronetError

FLOAT_BITS = 32
INTEGER_BITS = 8  # the widest integers that runtimes multiply fast
NUMBERS = range(2, 17)
Bits = int | str
WEIGHT_LEVELS = ("binary", "ternary")
ACTIVATION_LEVELS = ("binary",)
PERCENTILE = 99.99
CALIBRATION_BATCH = 64  # images
CALIBRATION_BATCHES = 4
EXCLUDED, FIRST_OR_LAST = "excluded", "first or last layer"  # why layers stay in float, in artifacts and ONNX files
FUNCTION_CALL = "a function call, not a module"
FIXED_WEIGHT = "its weight is fixed: a buffer or another tensor, not a parameter"
PRODUCT_OF_TWO = "a product of two activations"
STORED_FACTOR = "a product with a stored tensor that is no layer's weight, such as relative positions"
RUN_TIME_WEIGHTS = "its weights are computed at run time"
NO_DEFORMABLE = "ONNX Runtime has no int8 DeformConv"
Calibrator = Literal["minmax", "percentile", "entropy", "mse"]
CALIBRATOR: Calibrator = "minmax"


@dataclass(frozen=True)
class QuantConfig(Settings):
    """Quantization."""

    method: Literal["iao", "dorefa", "lsq"] = setting("iao", "Quantization scheme for numeric bit widths.", basic=True)
    w_bits: Bits = setting(8, "Bits per weight: 2 to 16, binary, ternary, or 32 for float.", basic=True, metavar="BITS")
    a_bits: Bits = setting(8, "Bits per activation: 2 to 16, binary, or 32 for float.", basic=True, metavar="BITS")
    q_type: Literal["auto", "sym", "asym"] = setting(
        "auto",
        "Symmetric quantization (zero point 0) or asymmetric (iao only). auto: symmetric, but asymmetric for "
        "8-bit activations that may be negative, unless --a-sign is signed. Activations of ONNX files are "
        "asymmetric, unless --a-sign is signed.",
        basic=True,
    )
    q_level: Literal["channel", "layer"] = setting("channel", "One weight scale per output channel, or one per layer.")
    weight_observer: Literal["minmax", "moving-average"] = setting(
        "minmax",
        "Weight ranges: minimum and maximum of the current weights, or a moving average over training steps (iao "
        "only).",
    )
    a_sign: Literal["auto", "signed"] = setting(
        "auto", "Integer type of nonnegative activations with --q-type sym: unsigned (auto), or signed for TensorRT."
    )
    first_last: Literal["auto", "float", "8bit", "8bit-input", "same"] = setting(
        "auto",
        "Precision of the first and last layers. auto: float if weights are binary or ternary, otherwise at least 8 "
        "bits, except that --mode ptq leaves last layers in float of which 8 bits would leave nothing. 8bit-input: "
        "weights as in the other layers, activations at 8 bits.",
    )
    a_gain: float = setting(
        0.1,
        "Gain of DoReFa activations, which are clipped to 0..1/gain: 1 as in the paper, or 0.1 for the range 0..10.",
        low=1e-3,
        high=1e3,
    )
    a_ste: Literal["ste", "saturate", "soft"] = setting("saturate", "Gradient estimator for binary activations.")
    w_ste: Literal["ste", "saturate", "soft"] = setting("ste", "Gradient estimator for binary and ternary weights.")
    w_center: bool = setting(False, "Subtract the mean over the inputs from binary weights before taking their signs.")
    no_alpha: bool = setting(False, "Disable the per-channel scale (alpha) of binary and ternary weights.")
    bn_fuse: bool = setting(False, "Fold batch norms into the preceding convolutions during training.")
    include: str | None = setting(None, "Quantize only these layers: comma-separated names or globs.")
    exclude: str | None = setting(None, "Keep these layers in float: comma-separated names or globs.")
    keep_8bit: str | None = setting(None, "Keep these layers at 8 bits or more: comma-separated names or globs.")
    float_outputs: bool = setting(
        False,
        "Do not quantize what a convolution gives if only the network's outputs depend on it. OpenVINO is faster so; "
        "ONNX Runtime then computes that convolution in float.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, levels in (("w_bits", WEIGHT_LEVELS), ("a_bits", ACTIVATION_LEVELS)):
            object.__setattr__(self, name, _bits(name, getattr(self, name), levels))
        if self.w_bits == self.a_bits == FLOAT_BITS:
            raise MicronetError("--w-bits 32 with --a-bits 32 quantizes nothing; lower at least one of them")
        with_levels = self.w_bits in WEIGHT_LEVELS
        for name, applies, what in (
            ("w_ste", with_levels, "--w-bits binary or ternary"),
            ("w_center", self.w_bits == "binary", "--w-bits binary"),
            ("no_alpha", with_levels, "--w-bits binary or ternary"),
            ("a_ste", self.a_bits in ACTIVATION_LEVELS, "--a-bits binary"),
            ("q_type", self.method == "iao", "--method iao"),
            ("weight_observer", self.method == "iao", "--method iao"),
            ("a_gain", self.method == "dorefa", "--method dorefa"),
            ("float_outputs", self.computes_in_integers, "weights and activations of at most 8 bits, not DoReFa's"),
        ):
            same = ("auto", "sym") if name == "q_type" else (getattr(QuantConfig, name),)  # for other methods
            if not applies and getattr(self, name) not in same:
                given = flag(name) if getattr(self, name) is True else f"{flag(name)} {getattr(self, name)}"
                raise MicronetError(f"{given} only applies to {what}; add that, or drop {flag(name)}")

    @property
    def computes_in_integers(self) -> bool:
        """Whether runtimes for 8-bit integers can compute the layers in integers."""
        numbers = isinstance(self.a_bits, int) and self.a_bits <= INTEGER_BITS and self.method != "dorefa"
        return numbers and (isinstance(self.w_bits, str) or self.w_bits <= INTEGER_BITS)

    @property
    def edge(self) -> Literal["float", "8bit", "8bit-input", "same"]:
        """How the first and the last layer are quantized."""
        if self.first_last != "auto":
            return self.first_last
        return "float" if self.w_bits in WEIGHT_LEVELS else "8bit"


def _bits(name: str, value: Bits, levels: tuple[str, ...]) -> Bits:
    """Return bits as a number or one of the named levels; raise MicronetError for anything else."""
    number = int(value) if str(value).isdigit() else value
    if number in levels or number == FLOAT_BITS or number in NUMBERS:
        return number
    allowed = ", ".join([f"{NUMBERS[0]} to {NUMBERS[-1]}", *levels])
    raise MicronetError(f"{flag(name)} is {value}; expected {allowed}, or {FLOAT_BITS} (float)")


@dataclass(frozen=True)
class RangeConfig(Settings):
    """Calibration."""

    calibrator: Calibrator | None = setting(
        None,
        "How to choose activation ranges: minimum and maximum, a percentile, least KL divergence (entropy), or least "
        "squared error (mse). Default: minmax for artifacts, the closer of mse and minmax for ONNX files, and entropy "
        "for TensorRT.",
    )
    percentile: float = setting(
        PERCENTILE, "Percentage of values inside the range, for --calibrator percentile.", low=50, high=100
    )
    calib_batches: int | None = setting(
        None,
        f"Number of calibration batches of {CALIBRATION_BATCH} images. Default: {CALIBRATION_BATCHES}, but all "
        "batches that Python gives to --mode ptq of a network other than an ONNX file.",
        low=1,
    )
    calib_data: Path | None = setting(
        None,
        "Folder of calibration images, labeled or not; for ONNX files, also an .npz file with one array for each "
        "input. Default: training images.",
        metavar="FOLDER",
    )
    calib_cache: Path | None = setting(
        None,
        "Cache file for activation statistics: read if it exists, otherwise written. Valid for any bit width.",
        metavar="FILE",
        place="cache",
    )

    @property
    def batches(self) -> int:
        """The number of batches to take from a data set, a folder or a generator of images."""
        return CALIBRATION_BATCHES if self.calib_batches is None else self.calib_batches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percentile != PERCENTILE and self.calibrator != "percentile":
            raise MicronetError(
                "--percentile only applies to --calibrator percentile; add --calibrator percentile, or drop "
                "--percentile"
            )


@dataclass(frozen=True)
class CalibrationConfig(RangeConfig):
    """Calibration and training mode."""

    calib_data: Path | None = setting(
        None,
        "Folder of calibration images, labeled or not; or none to generate images from the batch-norm statistics of "
        "an artifact (not for QAT); or, for ONNX files, an .npz file with one array for each input. Default: training "
        "images.",
        metavar="FOLDER",
    )
    mode: Literal["qat", "ptq", "qaft"] = setting(
        "qat",
        "Train with quantizers (qat), calibrate without training (ptq), or train a quantized artifact with frozen "
        "ranges (qaft).",
        basic=True,
    )
    float_weights: float | None = setting(
        None,
        "Initial fraction of QAT steps in which activations are quantized but weights stay in float. Default: 0.5 for "
        "binary weights and activations, otherwise 0.",
        low=0,
        high=0.9,
        metavar="SHARE",
    )

    @property
    def makes_images(self) -> bool:
        """Whether the images to calibrate on are made from the network."""
        return self.calib_data == Path("none")


@dataclass(frozen=True)
class RecoveryConfig(Settings):
    """Accuracy recovery without training."""

    equalize: bool = setting(
        False, "Balance weight ranges between layers before quantization (cross-layer equalization); folds batch norms."
    )
    weight_calibrator: Literal["minmax", "seq-mse"] = setting(
        "minmax",
        "How to choose weight scales: from the largest weight, or to minimize the output error of each layer in turn "
        "(iao).",
    )
    reconstruct: Literal["layer", "block"] | None = setting(
        None,
        "Learn weight rounding to preserve the outputs of each layer, or of each block of layers (which also learns "
        "activation scales); for 4 bits or fewer (iao). Use about 1,000 images: --calib-batches 16.",
    )
    adaround: bool = setting(False, "Same as --reconstruct layer.")
    bias_correct: bool = setting(
        False, "Correct biases so that the mean output of every layer matches that of the float network."
    )
    bn_reestimate: bool = setting(False, "Re-estimate batch-norm statistics in the quantized network.")
    target_drop: float | None = setting(
        None,
        "Keep the most sensitive layers at 8 bits, as many as needed to limit the drop in validation accuracy to "
        "this many percentage points.",
        low=0,
        high=100,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaround and self.reconstruct == "block":
            raise MicronetError("--adaround means --reconstruct layer; drop either --adaround or --reconstruct block")

    @property
    def form(self) -> Literal["layer", "block"] | None:
        """What is reconstructed, if anything."""
        return "layer" if self.adaround else self.reconstruct
