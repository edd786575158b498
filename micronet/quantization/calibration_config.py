"""The settings of calibration. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from micronet.core.config import Settings, setting
from micronet.errors import MicronetError

PERCENTILE = 99.99


@dataclass(frozen=True)
class RangeConfig(Settings):
    """Calibration."""

    calibrator: Literal["minmax", "percentile", "entropy", "mse"] = setting(
        "minmax",
        "Activation ranges: all values, a percentile of them, least KL divergence (entropy), or least squared error.",
    )
    percentile: float = setting(
        PERCENTILE, "Percentage of the values inside the range, for --calibrator percentile.", low=50, high=100
    )
    calib_batches: int = setting(4, "Batches of 64 images to calibrate on.", low=1)
    calib_data: Path | None = setting(
        None, "A folder of images to calibrate on, labelled or not; default: training images.", metavar="FOLDER"
    )
    calib_cache: Path | None = setting(
        None,
        "File of activation statistics: read if it exists, otherwise written. Serves any bit width.",
        metavar="FILE",
        place="cache",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percentile != PERCENTILE and self.calibrator != "percentile":
            raise MicronetError("--percentile only applies to --calibrator percentile; add that, or leave it out")


@dataclass(frozen=True)
class CalibrationConfig(RangeConfig):
    """Calibration and training mode."""

    mode: Literal["qat", "ptq", "qaft"] = setting(
        "qat",
        "Train with quantizers (qat), calibrate without training (ptq), or train a quantized artifact with frozen "
        "ranges (qaft).",
        basic=True,
    )
