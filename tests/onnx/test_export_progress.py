"""What an export says while torch works."""

import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.core.progress import Silent
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx
from micronet.onnx.graph_export import PHASES


class Chatty(nn.Module):
    """A network that prints, as users' networks do."""

    def forward(self, x):
        print("here")  # noqa: T201
        return x.relu()


class Steps(Silent):
    def __init__(self):
        self.seen = []

    def step(self, label, done, total, **numbers):
        self.seen.append((label, done, total))


def test_every_phase_of_torchs_exporter_is_a_step_and_other_output_passes(capsys):
    steps = Steps()
    to_onnx(Artifact(Chatty(), ModelSpec("mine.py:Chatty"), []), torch.randn(2, 3), progress=steps)
    assert steps.seen == [(f"exporting: {each}", number, len(PHASES)) for number, each in enumerate(PHASES.values())]
    assert set(capsys.readouterr().out.splitlines()) == {"here"}
