"""The defaults of ``quantize`` that depend on its other settings. No torch here, so ``--help`` stays fast."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from micronet.artifact.header import StageRecord
from micronet.quantization.config import Bits, CalibrationConfig, QuantConfig
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from micronet.stages.quantize import Quantize

QAFT_LR = 1e-5
# The smaller of the weights' and the activations' bits -> the learning rate that worked best (see BENCHMARKS.md).
LEARNING_RATES = ((1, 0.02), (3, 0.005), (6, 0.002), (16, 0.001))
AGREEMENT_SHARE = 0.1  # of these rates, for networks that stay close (see BENCHMARKS.md, "Without labels")
CLOSE_BITS = 3  # from which on a quantized network stays close to the float one, so that its norms' statistics hold
TAUGHT_BITS = 4  # up to which QAT gains from the float network's scores (BENCHMARKS.md, "Learned scales")
LEVELS_MUON_LR = 0.01  # with binary activations (scripts/bench_binary.py); weights with levels alone: LEVEL_WEIGHTS_LR
LEVEL_WEIGHTS_LR = 0.001  # at 0.01, nin_3x3 has 58 % instead of 80 % after the first of three epochs
FLOAT_WEIGHTS = 0.5  # a share of the steps, for binary weights; ternary ones gain nothing from it


def with_defaults(stage: "Quantize", teacher: Path | None, task: str | None) -> "Quantize":
    """Return a stage with the defaults that depend on other settings.

    Args:
        stage: The stage.
        teacher: The float artifact.
        task: The task that the network is trained for; None: classification.
    """
    training, calibration, bits = stage.training, stage.calibration, stage.quantization
    learns_levels = _has_levels(bits) and calibration.mode == "qat"
    if learns_levels and training.preset is None:
        training = replace(training, preset="fast")
    if is_taught(calibration, bits) and training.distill is None:
        training = replace(training, distill=teacher)
    if training.lr is None:
        close = calibration.mode == "qat" and task == "agreement" and _fewest(bits) >= CLOSE_BITS
        training = replace(training, lr=_learning_rate(calibration, bits, training) * (AGREEMENT_SHARE if close else 1))
    both = bits.w_bits == bits.a_bits == "binary"
    if learns_levels and both and calibration.float_weights is None and training.patience is None:
        calibration = replace(calibration, float_weights=FLOAT_WEIGHTS)
    return replace(stage, training=training, calibration=calibration)


def is_taught(calibration: CalibrationConfig, bits: QuantConfig) -> bool:
    """Return whether the float network is the teacher unless another one is given."""
    return calibration.mode == "qat" and _fewest(bits) <= TAUGHT_BITS


def _learning_rate(calibration: CalibrationConfig, bits: QuantConfig, training: TrainConfig) -> float:
    """Return the default learning rate: the fewer the bits, the farther the weights have to move."""
    if calibration.mode == "qaft":
        return QAFT_LR
    if _has_levels(bits) and training.chosen("optimizer") == "muon":
        return LEVELS_MUON_LR if bits.a_bits == "binary" else LEVEL_WEIGHTS_LR
    return next(rate for most, rate in LEARNING_RATES if _fewest(bits) <= most)


def _fewest(bits: QuantConfig) -> int:
    """Return the smaller of the weights' and the activations' bits."""
    return min(_count(bits.w_bits), _count(bits.a_bits))


def _count(bits: Bits) -> int:
    return bits if isinstance(bits, int) else {"binary": 1, "ternary": 2}[bits]


def _has_levels(bits: QuantConfig) -> bool:
    """Return whether weights or activations are binary or ternary."""
    return isinstance(bits.w_bits, str) or isinstance(bits.a_bits, str)


def stays_close(history: Iterable[StageRecord]) -> bool:
    """Return whether a network is quantized, but so finely that the statistics of its batch norms still hold."""
    configs = [record.config for record in history if record.stage == "quantize"]
    bits = [configs[-1].get(name) for name in ("w_bits", "a_bits")] if configs else [None]
    return all(isinstance(each, int) and each >= CLOSE_BITS for each in bits)
