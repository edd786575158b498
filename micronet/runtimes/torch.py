"""Run artifacts with PyTorch; quantized networks simulate their integers in float, as in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from micronet.artifact.artifact import Artifact, load
from micronet.core.machine import usable_threads
from micronet.data.dataset import DataSpec
from micronet.data.samples import example_of
from micronet.evaluation.accuracy import predictor
from micronet.evaluation.cost import count_macs
from micronet.evaluation.network import Scores
from micronet.models.calling import take_in_order
from micronet.models.device import inference_format, pick_device
from micronet.runtimes.config import RuntimeOptions


class EagerPredictor:
    """A torch network in eval mode."""

    runtime = "torch"

    def __init__(self, source: Path | Artifact, options: RuntimeOptions) -> None:
        artifact = source
        if isinstance(artifact, Path):
            artifact = load(artifact, options.model, trust_code=options.trust_code)
        torch.set_num_threads(options.threads or usable_threads())
        self.model = artifact.model.eval().to(pick_device(options.device))
        self.model.to(memory_format=inference_format(self.model))
        self._predict = predictor(self.model)
        self.data = DataSpec.from_json(artifact.data) if artifact.data else None
        self.params = sum(parameter.numel() for parameter in self.model.parameters())
        self.stages: Sequence[str] = [record.stage for record in artifact.history]

    def __call__(self, inputs: Any) -> Scores:
        """Return the outputs for a batch, such as the scores (N, K) of images (N, C, H, W) float32."""
        return self._predict(inputs)

    def take_in_order(self, described: list[dict[str, Any]]) -> None:
        """Make the network take inputs of this description by their order (see ``models.calling``)."""
        take_in_order(self.model, described)

    def macs(self, *shapes: tuple[int, ...]) -> int:
        """Count the multiply-accumulates for one sample with inputs of these shapes, such as an image (C, H, W)."""
        described = (self.data and self.data.inputs) or [{"shape": shape, "dtype": "float32"} for shape in shapes]
        return count_macs(self.model, example_of(described, 1))
