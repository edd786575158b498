import torch

from micronet.artifact.foreign import import_model


def test_initial_weights_follow_from_the_seed_alone():
    first, other = (import_model("lenet", {"width": 0.1}, None, seed=seed).model.state_dict() for seed in (1, 2))
    torch.rand(3)
    again = import_model("lenet", {"width": 0.1}, None).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
