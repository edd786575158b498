"""The tests have torch trace equal networks once; see conftest.py."""

import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec
from micronet.onnx.export import to_onnx


def test_only_another_network_is_traced_again(monkeypatch):
    def exported(weight):
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, weight)
        nn.init.constant_(model.bias, 0.125)
        return to_onnx(Artifact(model, ModelSpec("torch.nn:Linear"), []), torch.ones(2, 3))

    traced, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: traced.append(1) or export(*a, **k))
    first = exported(0.25)
    traced.clear()
    assert exported(0.25) == first and not traced
    assert exported(0.5) != first and traced
