"""The settings of accuracy recovery. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass

from micronet.core.config import Settings, setting


@dataclass(frozen=True)
class RecoveryConfig(Settings):
    """Accuracy recovery without training."""

    equalize: bool = setting(False, "Balance weight ranges between layers before quantizing; folds batch norms.")
    adaround: bool = setting(False, "Learn the rounding of each weight, layer by layer; for 4 bits and below (iao).")
    bias_correct: bool = setting(False, "Restore the mean output that each layer has in the float network.")
    bn_reestimate: bool = setting(False, "Re-estimate batch-norm statistics on the quantized network.")
    target_drop: float | None = setting(
        None,
        "Keep the most sensitive layers at 8 bits until the accuracy drop on validation images is at most this many "
        "percentage points.",
        low=0,
        high=100,
    )
