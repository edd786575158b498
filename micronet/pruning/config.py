"""The settings of pruning. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass, replace
from typing import Literal

from micronet.core.config import Settings, flag, setting
from micronet.errors import MicronetError

DEFAULT_SHARE = 0.5
TARGETS = ("target_macs", "target_params", "target_latency")


@dataclass(frozen=True)
class PruneConfig(Settings):
    """Pruning."""

    percent: float | None = setting(
        None,
        f"Fraction of the prunable channels to remove: at least 0, less than 1. Default: {DEFAULT_SHARE}.",
        basic=True,
    )
    regular: int = setting(
        1, "Make every width a multiple of this number; kernels are fastest at multiples of 8 or 16.", low=1, basic=True
    )
    criterion: Literal["auto", "bn-scale", "l1", "l2", "fpgm", "taylor", "random"] = setting(
        "auto",
        "How to rank channels: by batch-norm scale, weight norm (l1, l2), distance to the geometric median (fpgm), "
        "effect on the loss (taylor), or at random. auto: that of sparse-train, or bn-scale if every channel has a "
        "batch norm, otherwise l2.",
        basic=True,
    )
    scope: Literal["global", "layer"] = setting(
        "global", "Rank all channels together, or prune every layer by the same fraction."
    )
    min_channels: int = setting(1, "Minimum width of a layer; narrower layers are not pruned.", low=1)
    exclude: str | None = setting(None, "Layers not to prune: comma-separated names or globs.")
    widths: str | None = setting(None, "Exact widths, one per prunable group, separated by commas. Replaces --percent.")
    target_macs: float | None = setting(
        None, "Prune until this fraction of the multiply-accumulates (MACs) is left.", basic=True
    )
    target_params: float | None = setting(None, "Prune until this fraction of the parameters is left.")
    target_latency: float | None = setting(
        None,
        "Prune until the latency is this fraction of the original (for one image in ONNX Runtime on this machine).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise MicronetError(f"--percent is {self.share:g}; allowed: at least 0 and less than 1, for example 0.5")
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise MicronetError(f"{flag(name)} is {value:g}; allowed: more than 0 and less than 1, for example 0.5")
        if len(self.goals) > 1:
            raise MicronetError(f"{' and '.join(map(flag, self.goals))} both set how much to prune; use only one")
        if self.widths is not None and self.min_channels > 1:
            raise MicronetError("--widths sets every width, so --min-channels has no effect; drop --min-channels")

    def share_per_step(self, steps: int) -> "PruneConfig":
        """Return the config of each of several equal steps that together cut what this one does."""
        if steps == 1:
            return self
        if self.widths is not None:
            raise MicronetError("--widths prunes in a single step; drop --steps")
        if self.target is not None:
            name, share = self.target
            return replace(self, **{name: share ** (1 / steps)})
        return replace(self, percent=1 - (1 - self.share) ** (1 / steps))

    @property
    def goals(self) -> list[str]:
        """The settings given that say how much to cut."""
        return [name for name in ("percent", "widths", *TARGETS) if getattr(self, name) is not None]

    @property
    def share(self) -> float:
        """The share of the channels to cut if neither widths nor a target decide."""
        return DEFAULT_SHARE if self.percent is None else self.percent

    @property
    def target(self) -> tuple[str, float] | None:
        """The target that is set and the share that may be left, or None."""
        return next(((name, getattr(self, name)) for name in TARGETS if getattr(self, name) is not None), None)


@dataclass(frozen=True)
class SparsityConfig(Settings):
    """Sparsity."""

    s: float = setting(1e-4, "Weight of the sparsity penalty.", low=0, basic=True)
    criterion: Literal["bn-scale", "l1", "l2"] = setting(
        "bn-scale",
        "What the penalty pushes toward zero: batch-norm scales, individual weights (l1), or the weights of whole "
        "channels (l2, group lasso). Attention heads are not penalized.",
        basic=True,
    )
