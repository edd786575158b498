import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from micronet import prune
from micronet.artifact.artifact import load
from micronet.artifact.header import StageRecord
from micronet.models.build import ModelSpec, build_model
from micronet.pruning.config import SparsityConfig
from micronet.pruning.criteria.bn_scale import penalty, scores
from micronet.pruning.groups import find_groups


def scales(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_penalty_adds_the_l1_subgradient_to_every_scale_but_the_last():
    model = build_model(ModelSpec("nin", {"width": 0.1}))
    norms = scales(model)
    norms[0].weight.data[:2] = torch.tensor([-0.5, 0.0])
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    F.cross_entropy(model(images), labels).backward()
    plain = [norm.weight.grad.clone() for norm in norms]
    penalty(model, find_groups(model, images), 0.01)()
    for norm, before in zip(norms[:-1], plain[:-1], strict=True):
        torch.testing.assert_close(norm.weight.grad, before + 0.01 * norm.weight.sign(), rtol=0, atol=0)
    assert norms[0].weight.grad[1] == plain[0][1]
    assert torch.equal(norms[-1].weight.grad, plain[-1])


def test_sparse_training_shrinks_scales_and_keeps_the_last_epoch(micronet, chain, tmp_path):
    def train(s):
        path = tmp_path / f"{s}.safetensors"
        done = micronet(
            "sparse-train",
            chain / "float.safetensors",
            "--s",
            s,
            "--epochs",
            "3",
            "--limit",
            "160",
            "-o",
            path,
            "--json",
        )
        assert done.code == 0, done.err
        assert done.json["epoch"] == 3
        artifact = load(path)
        assert artifact.history[-1].config["s"] == s
        return sum(float(norm.weight.abs().sum()) for norm in scales(artifact.model)[:-1])

    assert train(0.1) < train(0.0)


def test_sparse_training_begins_from_nothing_too(micronet, tmp_path):
    path = tmp_path / "a.safetensors"
    done = micronet("sparse-train", "--width", 0.1, "--limit", 100, "--epochs", 1, "-o", path)
    assert done.code == 0, done.err
    assert [record.stage for record in load(path).history] == ["train", "sparse-train"]


def test_a_joint_channel_is_worth_the_mean_of_its_scales():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.bn_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.bn_a(self.a(x))
            return self.last(x + self.bn_b(self.b(x)))

    model = Block()
    model.bn_a.weight.data = torch.tensor([1.0, -2.0, 3.0, 0.0])
    model.bn_b.weight.data = torch.tensor([3.0, 0.0, -1.0, 0.0])
    flow = find_groups(model, torch.randn(2, 3, 6, 6))
    assert np.array_equal(scores(model, flow)[0], [2.0, 1.0, 2.0, 0.0])


def test_a_penalty_of_another_weight_is_not_resumed(micronet, chain, tmp_path, monkeypatch):
    few = [chain / "float.safetensors", "--epochs", 2, "--limit", 100, "-o", tmp_path / "a.safetensors"]
    with monkeypatch.context() as patched:
        patched.setattr("micronet.artifact.artifact.save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert micronet("sparse-train", *few, "--s", 1e-5).code == 1
    done = micronet("sparse-train", *few, "--s", 10, "--resume")
    assert done.code == 2
    assert "stage" in done.err
    assert micronet("sparse-train", *few, "--s", 1e-5, "--resume").code == 0


def test_nothing_to_penalise_is_said(micronet, tmp_path):
    done = micronet("sparse-train", "--model", "lenet", "--limit", 100, "-o", tmp_path / "a.safetensors")
    assert done.code == 2
    assert "nothing to penalize" in done.err


def test_channels_are_ranked_by_what_a_sparse_training_penalized():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    whole = prune(net, torch.rand(2, 3, 8, 8), percent=0.0)
    sparse = whole.after(StageRecord("sparse-train", SparsityConfig(criterion="l1").to_json()))
    pruned = prune(sparse, torch.rand(2, 3, 8, 8))
    assert pruned.history[-1].config["criterion"] == "l1"
