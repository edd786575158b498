"""Staged training: activations are quantized from the first step, weights later."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from micronet.quantization.calibrate import each_quantizer, observing


@dataclass(frozen=True)
class StagedWeights:
    """Keeps the weights float in the first steps of a training, after which they are quantized too.

    Float weights first adapt to binary activations, and binary weights then begin from there (Bulat and Tzimiropoulos
    2019, arXiv:1904.05868; Martinez et al. 2020, arXiv:2003.11535, section 4.2). Outside ``observing``, as in
    validation, all weights are quantized.

    Attributes:
        model: A quantized network.
        share: The share of the steps with float weights, 0..1.
    """

    model: nn.Module
    share: float

    def before_step(self, done: float) -> None:
        """Prepare a step, where ``done`` is the share of the steps that is over, 0..1."""
        self._keep_float(done < self.share)

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observe ranges, as in ``calibrate``, and quantize all weights on exit."""
        with observing(model):
            try:
                yield
            finally:
                self._keep_float(False)

    def _keep_float(self, keep: bool) -> None:
        for _, slot, quantizer in each_quantizer(self.model):
            if slot == "weight_quantizer":
                quantizer.recorder = _ignore if keep else None


def _ignore(x: Tensor) -> None:
    """Record nothing: a quantizer with a recorder returns its input as it is."""
