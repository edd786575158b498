"""What a user chooses about finding ranges, checked once; no torch here, so that ``--help`` stays fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from micronet.core.config import Settings, check_range, check_values, setting
from micronet.errors import MicronetError

PERCENTILE = 99.99


@dataclass(frozen=True)
class RangeConfig(Settings):
    """How ranges are found."""

    calibrator: Literal["minmax", "percentile", "entropy", "mse"] = setting(
        "minmax", "Activation ranges: all values; a share of them; least divergence; least squared error."
    )
    percentile: float = setting(PERCENTILE, "Share of values in the range, in percent, of the percentile calibrator.")
    calib_batches: int = setting(4, "Batches of 64 images to calibrate on.")
    calib_data: Path | None = setting(None, "A folder of images, labelled or not; default: training images.")  # noqa: RUF009
    calib_cache: Path | None = setting(  # noqa: RUF009
        None, "File of activation statistics: written where it is not there, else read, for other bits."
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "percentile", 50, 100)
        check_range(self, "calib_batches", 1)
        if self.percentile != PERCENTILE and self.calibrator != "percentile":
            raise MicronetError("--percentile is for --calibrator percentile; name that, or leave it out")


@dataclass(frozen=True)
class CalibrationConfig(RangeConfig):
    """How ranges are found, and whether the network is trained."""

    mode: Literal["qat", "ptq", "qaft"] = setting(
        "qat", "Train with quantizers; or set ranges from data alone; or train a quantized artifact, ranges frozen."
    )
