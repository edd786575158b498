"""What a user chooses of the ways to win accuracy back without training; no torch here, so ``--help`` stays fast."""

from dataclasses import dataclass

from micronet.core.config import Settings, check_range, check_values, setting


@dataclass(frozen=True)
class RecoveryConfig(Settings):
    """What is won back without training."""

    equalize: bool = setting(False, "Balance weight ranges between layers first; folds batch norms.")
    adaround: bool = setting(False, "Learn each weight's rounding, layer by layer; for 4 bits and below (iao).")
    bias_correct: bool = setting(False, "Move each layer's mean output back to the float network's.")
    bn_reestimate: bool = setting(False, "Estimate batch norms anew on the quantized network.")
    target_drop: float | None = setting(
        None, "Keep the most sensitive layers at 8 bits until the drop on validation images is at most this, in points."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.target_drop is not None:
            check_range(self, "target_drop", 0, 100)
