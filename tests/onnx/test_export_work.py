"""What an export does once, or leaves out, because it takes long."""

import pytest
import torch
from torch import nn
from torch.fx import config as fx_config

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx
from micronet.quantization import fold

IMAGES = torch.randn(2, 3, 4, 4)


class Watching(nn.Module):
    """A network that notes in each call whether torch leaves stacks out."""

    def __init__(self, noted):
        super().__init__()
        self.note = lambda: noted.append(fx_config.do_not_emit_stack_traces)

    def forward(self, x):
        self.note()
        return x.relu()


@pytest.mark.parametrize("pairs", [True, False], ids=["for a file", "for messages that name lines"])
def test_stacks_of_code_are_recorded_only_where_they_are_read(pairs, monkeypatch):
    monkeypatch.setattr(fx_config, "do_not_emit_stack_traces", False)  # conftest.py saves their time
    noted = []
    to_onnx(Artifact(Watching(noted).eval(), ModelSpec("mine.py:Watching"), []), IMAGES, pairs=pairs)
    assert (True in noted) == pairs
    assert not fx_config.do_not_emit_stack_traces


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.Identity()], ids=["batch norm", "no batch norm"])
def test_a_network_is_traced_once_to_fold_its_batch_norms(monkeypatch, norm):
    trace, traced = fold.trace, []
    monkeypatch.setattr(fold, "trace", lambda *given: traced.append(given) or trace(*given))
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()).eval()
    proto = to_onnx(Artifact(network, ModelSpec("mine.py:network"), []), IMAGES)
    assert len(traced) == 1
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Relu"]
