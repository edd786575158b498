"""What a user chooses about quantization, checked once; no torch here, so that ``--help`` stays fast."""

from dataclasses import dataclass, fields
from typing import Literal

from micronet.core.config import Settings, check_range, check_values, flag, setting
from micronet.errors import MicronetError

FLOAT_BITS = 32
NUMBERS = range(2, 17)
Bits = int | str
WEIGHT_LEVELS = ("binary", "ternary")
ACTIVATION_LEVELS = ("binary",)


@dataclass(frozen=True)
class QuantConfig(Settings):
    """How to quantize."""

    method: Literal["iao", "dorefa", "lsq"] = setting("iao", "Scheme behind bits that are numbers.")
    w_bits: Bits = setting(8, "Bits of the weights: 2 to 16, binary, ternary, or 32 to leave them float.")  # noqa: RUF009
    a_bits: Bits = setting(8, "Bits of the activations: 2 to 16, binary, or 32 to leave them float.")  # noqa: RUF009
    q_type: Literal["sym", "asym"] = setting("sym", "Symmetric grids (zero point 0), or asymmetric ones (iao).")
    q_level: Literal["channel", "layer"] = setting("channel", "One weight scale an output channel, or one a layer.")
    weight_observer: Literal["minmax", "moving-average"] = setting(
        "minmax", "Weight range: of the weights as they are, or averaged over training steps (iao)."
    )
    a_sign: Literal["auto", "signed"] = setting(
        "auto", "Symmetric activations that are never negative: an unsigned grid (auto), or signed as TensorRT needs."
    )
    first_last: Literal["auto", "float", "8bit", "8bit-input", "same"] = setting(
        "auto",
        "First and last layer: float where weights are binary or ternary, else at least 8 bits; or as named: "
        "8bit-input has the weights of the others and reads 8 bits.",
    )
    a_gain: float = setting(0.1, "DoReFa's activations are clipped to 1 / this: 1 is the paper's, 0.1 covers 0 to 10.")
    a_ste: Literal["ste", "saturate", "soft"] = setting("saturate", "Gradient of binary activations.")
    w_ste: Literal["ste", "saturate", "soft"] = setting("ste", "Gradient of binary and ternary weights.")
    no_alpha: bool = setting(False, "Binary and ternary weights without a magnitude a channel.")
    bn_fuse: bool = setting(False, "Fold batch norms into the convolutions before them while training.")
    include: str | None = setting(None, "Quantize these layers only: names or globs, with commas between them.")
    exclude: str | None = setting(None, "Leave these layers float: names or globs, with commas between them.")

    keep_8bit: str | None = setting(None, "Layers that keep at least 8 bits: names or globs, with commas between them.")

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "a_gain", 1e-3, 1e3)
        for name, levels in (("w_bits", WEIGHT_LEVELS), ("a_bits", ACTIVATION_LEVELS)):
            object.__setattr__(self, name, _bits(name, getattr(self, name), levels))
        if self.w_bits == self.a_bits == FLOAT_BITS:
            raise MicronetError("--w-bits 32 with --a-bits 32 quantizes nothing; lower one of them")
        with_levels = self.w_bits in WEIGHT_LEVELS
        for name, serves, what in (
            ("w_ste", with_levels, "--w-bits binary or ternary"),
            ("no_alpha", with_levels, "--w-bits binary or ternary"),
            ("a_ste", self.a_bits in ACTIVATION_LEVELS, "--a-bits binary"),
            ("weight_observer", self.method == "iao", "--method iao"),
        ):
            default = next(item.default for item in fields(self) if item.name == name)
            if not serves and getattr(self, name) != default:
                raise MicronetError(f"{flag(name)} is for {what}; leave it out")

    @property
    def edge(self) -> Literal["float", "8bit", "8bit-input", "same"]:
        """What becomes of the first and the last layer."""
        if self.first_last != "auto":
            return self.first_last
        return "float" if self.w_bits in WEIGHT_LEVELS else "8bit"


def _bits(name: str, value: Bits, levels: tuple[str, ...]) -> Bits:
    """Return bits as a number or one of the named levels. Raises MicronetError for anything else."""
    number = int(value) if str(value).isdigit() else value
    if number in levels or number == FLOAT_BITS or number in NUMBERS:
        return number
    words = "".join(f"{level}, " for level in levels)
    raise MicronetError(
        f"{flag(name)} is {value}; allowed: {NUMBERS[0]} to {NUMBERS[-1]}, {words}or {FLOAT_BITS} (off)"
    )
