"""Distillation: learning from a teacher's scores besides the labels (Hinton et al. 2015, arXiv:1503.02531).

loss = (1 - w) * cross-entropy + w * T^2 * KL(softmax(teacher / T) || softmax(student / T)); T^2 is from section 2.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact, load, weights_hash
from micronet.artifact.header import read_header
from micronet.core.files import file_hash
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec
from micronet.models.device import inference_format, place_inputs
from micronet.models.modes import copy_model
from micronet.tasks.agreement import relative_error
from micronet.tasks.task import Outputs, Task, first_output, outputs_of
from micronet.training.config import RunContext, TrainConfig


@dataclass(frozen=True)
class Teacher:
    """A network in eval mode that is not trained, the weight of its loss and the softmax temperature."""

    model: nn.Module
    weight: float
    temperature: float

    @torch.no_grad()
    def outputs(self, inputs: tuple[Tensor, ...]) -> Outputs:
        """Return the teacher's outputs for a batch of inputs."""
        own = place_inputs(inputs, inputs[0].device, inference_format(self.model))
        return outputs_of(self.model(*own))

    def blend(self, loss: Tensor, outputs: Outputs, inputs: tuple[Tensor, ...], task: Task) -> Tensor:
        """Return the student's loss from labels with the teacher's part included.

        Class scores (N, K, ...) are softened; of other tasks, all outputs are compared as ``relative_error`` does.

        Args:
            loss: The student's, from labels.
            outputs: The student's.
            inputs: Of both networks.
            task: Of both networks.

        Raises:
            MicronetError: The teacher's outputs have other shapes.
        """
        taught = self.outputs(inputs)
        if not task.has_classes:
            return (1 - self.weight) * loss + self.weight * relative_error(outputs, taught)
        scores, targets = first_output(outputs), first_output(taught)
        if targets.shape != scores.shape:
            raise MicronetError(
                f"the teacher's scores have shape {tuple(targets.shape)}, but the student's have "
                f"{tuple(scores.shape)}; choose a teacher with the same classes as the student"
            )
        student, teacher = (F.log_softmax(each / self.temperature, 1) for each in (scores, targets))
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True) / (scores.numel() / scores.shape[1])
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def load_teacher(config: TrainConfig, student: Artifact, spec: DataSpec, context: RunContext) -> Teacher | None:
    """Load the teacher that a config names; return None if it names none.

    A teacher built by the same file as the student, which the user already trusts, needs no further permission.
    Raises MicronetError if other code would run, or the teacher expects other images than the student gets.
    """
    if config.distill is None:
        return None
    teacher = _open(config.distill, student, context)
    expected = DataSpec.from_json(teacher.data)
    for name in ("classes", "channels", "image_size", "mean", "std"):
        own = getattr(expected, name)
        if name == "classes" and spec.classes is None:  # the task has none: it compares outputs
            continue
        if own is not None and own != getattr(spec, name):
            raise MicronetError(
                f"--distill {config.distill} was trained with {name} {own}, but the student's data set has "
                f"{getattr(spec, name)}; choose a teacher trained with the same data and preprocessing"
            )
    model = teacher.model.eval().to(context.device)
    return Teacher(model.to(memory_format=inference_format(model)), config.distill_weight, config.temperature)


def teacher_hash(config: TrainConfig, context: RunContext) -> str | None:
    """Return a hash that changes with the teacher; None if there is none."""
    if config.distill is None:
        return None
    held = context.artifacts.get(config.distill)
    return file_hash(config.distill) if held is None else weights_hash(held.model)


def _open(path: Path, student: Artifact, context: RunContext) -> Artifact:
    """Open a teacher; raise MicronetError if code would run that the user does not trust yet."""
    if path in context.artifacts:
        held = context.artifacts[path]
        return replace(held, model=copy_model(held.model))  # the caller's network keeps its mode and device
    built = ModelSpec.from_json(read_header(path)[0].model)
    same_file = built.sha256 is not None and built.sha256 == student.spec.sha256
    if built.runs_user_code and not (context.trust_code or same_file or built == student.spec):
        raise MicronetError(
            f"--distill {path}: this teacher is built by custom code, {built.name}, which is not run "
            "automatically; add --trust-code to run the code recorded in its file"
        )
    return load(path, trust_code=True)
