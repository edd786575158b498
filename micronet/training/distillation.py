"""Learning from a teacher's scores besides the labels (Hinton et al. 2015, arXiv:1503.02531).

loss = (1 - w) * cross-entropy + w * T^2 * KL(softmax(teacher / T) || softmax(student / T)), section 2's T^2 included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact, load
from micronet.artifact.header import read_header
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.training.config import TrainConfig


@dataclass(frozen=True)
class Teacher:
    """A network in eval mode that is never trained, and how much its word counts."""

    model: nn.Module
    weight: float
    temperature: float

    def blend(self, loss: Tensor, scores: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss with the teacher's part in it. scores: (N, K); inputs: (N, C, H, W), what both networks see.

        Raises MicronetError where the teacher scores other classes.
        """
        with torch.no_grad():
            taught = self.model(inputs)
        if taught.shape != scores.shape:
            raise MicronetError(f"the teacher's scores are {tuple(taught.shape)}, the student's {tuple(scores.shape)}")
        divergence = F.kl_div(
            F.log_softmax(scores / self.temperature, 1),
            F.log_softmax(taught / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def load_teacher(config: TrainConfig, student: Artifact, spec: DataSpec, device: torch.device) -> Teacher | None:
    """Load the teacher a config names, or return None where it names none.

    Where it is made by the very code of the student, which the user has allowed to run, it needs no further word.
    Raises MicronetError where it expects other images than the student gets.
    """
    if config.distill is None:
        return None
    header, _ = read_header(config.distill)
    teacher = load(config.distill, trust_code=header.model == student.spec.to_json())
    expected = DataSpec.from_json(teacher.data)
    for name in ("classes", "channels", "image_size", "mean", "std"):
        own = getattr(expected, name)
        if own is not None and own != getattr(spec, name):
            raise MicronetError(
                f"--distill {config.distill} expects images of {name} {own}, the student gets {getattr(spec, name)}"
            )
    model = teacher.model.eval().to(device).to(memory_format=torch.channels_last)
    return Teacher(model, config.distill_weight, config.temperature)
