"""What a user chooses about pruning, checked once; no torch here, so that ``--help`` stays fast."""

from dataclasses import dataclass, replace
from typing import Literal

from micronet.core.config import Settings, check_range, check_values, flag, setting
from micronet.errors import MicronetError

USUAL_SHARE = 0.5
TARGETS = ("target_macs", "target_params", "target_latency")


@dataclass(frozen=True)
class PruneConfig(Settings):
    """How to prune."""

    percent: float | None = setting(
        None, f"Share of the prunable channels to cut, 0 up to but not 1. Default: {USUAL_SHARE}."
    )
    regular: int = setting(1, "Make every width a multiple of this; 8 or 16 is what kernels are fast with.")
    criterion: Literal["bn-scale", "l1", "l2", "fpgm", "taylor", "random"] = setting(
        "bn-scale", "What a channel is judged by: its batch norm's scale, its weights' size, their distance to others, "
        "their effect on the loss.",
    )  # fmt: skip
    scope: Literal["global", "layer"] = setting("global", "Compare all channels, or cut the same share of each layer.")
    min_channels: int = setting(1, "The least width of a layer (layers that have fewer are left whole).")
    exclude: str | None = setting(None, "Layers to leave whole: names and globs, by commas.")
    widths: str | None = setting(None, "The widths themselves, one a prunable group, by commas, in place of --percent.")
    target_macs: float | None = setting(None, "Cut until this share of the multiply-accumulates is left.")
    target_params: float | None = setting(None, "Cut until this share of the parameters is left.")
    target_latency: float | None = setting(
        None, "Cut until ONNX Runtime, measured here on one image, takes this share of its time."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.share < 1:  # NaN is not
            raise MicronetError(f"--percent is {self.share:g}; allowed: 0 up to but not 1, for example 0.5 for half")
        check_range(self, "regular", 1)
        check_range(self, "min_channels", 1)
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise MicronetError(
                    f"{flag(name)} is {value:g}; allowed: above 0 and below 1, for example 0.5 for half"
                )
        if len(self.ways) > 1:
            raise MicronetError(f"{' and '.join(map(flag, self.ways))} each say how much to cut; give one of them")
        if self.widths is not None and self.min_channels > 1:
            raise MicronetError("--widths say every width; leave --min-channels out")

    def share_a_step(self, steps: int) -> "PruneConfig":
        """Return what to do in each of several steps so that all together do what this says."""
        if steps == 1:
            return self
        if self.widths is not None:
            raise MicronetError("--widths are reached in one step; leave --steps out")
        if self.target is not None:
            name, share = self.target
            return replace(self, **{name: share ** (1 / steps)})
        return replace(self, percent=1 - (1 - self.share) ** (1 / steps))

    @property
    def ways(self) -> list[str]:
        """Return the fields given that say how much to cut."""
        return [name for name in ("percent", "widths", *TARGETS) if getattr(self, name) is not None]

    @property
    def share(self) -> float:
        """Return the share of the channels to cut, where neither widths nor a target say how much."""
        return USUAL_SHARE if self.percent is None else self.percent

    @property
    def target(self) -> tuple[str, float] | None:
        """Return the cost that has a target and the share of it that may be left, or None."""
        for name in TARGETS:
            value: float | None = getattr(self, name)
            if value is not None:
                return name, value
        return None


@dataclass(frozen=True)
class SparsityConfig(Settings):
    """How to make channels sparse."""

    s: float = setting(1e-4, "Weight of the penalty.")
    criterion: Literal["bn-scale", "l1", "l2"] = setting(
        "bn-scale", "What is pushed towards zero: batch norms' scales; weights; whole channels' weights (group lasso). "
        "The heads of torch's attention are not pushed.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "s", 0)
