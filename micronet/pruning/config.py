"""What a user chooses about pruning, checked once; no torch here, so that ``--help`` stays fast."""

import math
from dataclasses import dataclass

from micronet.errors import MicronetError
from micronet.settings import Settings, check_range, check_values, setting


@dataclass(frozen=True)
class PruneConfig(Settings):
    """How to prune."""

    percent: float = setting(0.5, "Share of the prunable channels to cut, 0 up to but not 1.")
    regular: int = setting(1, "Make every width a multiple of this; 8 or 16 is what kernels are fast with.")

    def __post_init__(self) -> None:
        check_values(self)
        if not (math.isfinite(self.percent) and 0 <= self.percent < 1):
            raise MicronetError(f"--percent is {self.percent:g}; allowed: 0 up to but not 1, for example 0.5 for half")
        check_range(self, "regular", 1)


@dataclass(frozen=True)
class SparsityConfig(Settings):
    """How to make channels sparse."""

    s: float = setting(1e-4, "Weight of the L1 penalty on batch-norm scales.")

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "s", 0)
