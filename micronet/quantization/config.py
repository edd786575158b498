"""What a user chooses about quantization, checked once; no torch here, so that ``--help`` stays fast."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from micronet.errors import MicronetError
from micronet.settings import check_choices, flag, setting

FLOAT_BITS = 32
BITS = (*range(2, 17), FLOAT_BITS)


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize."""

    method: Literal["iao"] = setting("iao", "Quantization scheme.")
    w_bits: int = setting(8, "Bits of the weights: 2 to 16, or 32 to leave them float.")
    a_bits: int = setting(8, "Bits of the activations: 2 to 16, or 32 to leave them float.")
    q_type: Literal["sym", "asym"] = setting("sym", "Symmetric grids (zero point 0), or asymmetric ones.")
    q_level: Literal["channel", "layer"] = setting("channel", "One weight scale an output channel, or one a layer.")
    weight_observer: Literal["minmax", "moving-average"] = setting(
        "minmax", "Weight range: of the weights as they are, or averaged over training steps."
    )
    a_sign: Literal["auto", "signed"] = setting(
        "auto", "Symmetric activations that are never negative: an unsigned grid (auto), or signed as TensorRT needs."
    )
    first_last: Literal["8bit", "same"] = setting(
        "8bit", "First and last layer: at least 8 bits, or the same bits as the rest."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("w_bits", "a_bits"):
            bits = getattr(self, name)
            if bits not in BITS:
                raise MicronetError(f"{flag(name)} is {bits}; allowed: {BITS[0]} to {BITS[-2]}, or {FLOAT_BITS} (off)")
        if self.w_bits == self.a_bits == FLOAT_BITS:
            raise MicronetError("--w-bits 32 with --a-bits 32 quantizes nothing; lower one of them")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)
