"""Batches as users give them, and inputs described in JSON."""

import inspect

import pytest
import torch
from torch import nn

import micronet
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.models.device import Inputs
from micronet.models.inputs import describe_inputs, inputs_in, make_inputs
from micronet.models.spec import LARGEST_INPUT


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a, b, scale=1.0):
        return self.left(a) + self.right(b) * scale


A, B = torch.ones(5, 3), torch.ones(5, 2)
SCALE = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (Two(), (A, B), (A, B)),
        (Two(), [A, B, "label"], (A, B)),
        (Two(), {"b": B, "a": A, "y": 1}, (A, B)),
        (Two(), {"scale": SCALE, "b": B, "a": A}, (A, B, SCALE)),
        (Two(), Inputs((A, B, SCALE)), (A, B, SCALE)),
        (Two().left, (A, "label"), (A,)),
        (Two().left, A, (A,)),
    ],
)
def test_batches_hold_the_inputs_that_forward_requires(model, batch, expected):
    found = inputs_in(model, batch)
    found = found if isinstance(found, Inputs) else (found,)
    assert len(found) == len(expected) and all(x is y for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("batch", "words"), [((A,), "2 inputs (a, b)"), ({"a": A}, "has no b"), ((A, 1), "got Tensor, int"), ("x", "2 inp")]
)
def test_batches_that_lack_inputs_are_refused(batch, words):
    with pytest.raises(MicronetError, match=words.replace("(", r"\(").replace(")", r"\)")):
        inputs_in(Two(), batch)


def test_networks_with_several_inputs_quantize_in_memory():
    tuples = micronet.quantize(Two(), data=[(A, B)], mode="ptq")
    named = micronet.quantize(Two(), data={"b": B, "a": A}, mode="ptq")
    trained = micronet.quantize(Two(), data=[(A, B)], mode="ptq")
    micronet.calibrate(trained.model, [{"a": A, "b": B}])
    assert not tuples.left_float and not named.left_float
    assert "Batch" in inspect.signature(micronet.quantize).parameters["data"].annotation


def test_described_inputs_are_made_again_and_bounded():
    described = describe_inputs([A, torch.zeros(2, dtype=torch.int64)])
    made = make_inputs(described)
    assert [(x.shape, x.dtype) for x in made] == [(A.shape, A.dtype), (torch.Size([2]), torch.int64)]
    assert all(torch.equal(x, y) for x, y in zip(made, make_inputs(described), strict=True))
    for wrong in ({"shape": [2, LARGEST_INPUT], "dtype": "float32"}, {"shape": [-1], "dtype": "float32"},
                  {"shape": [1], "dtype": "save"}, {"shape": 3, "dtype": "float32"}, {"shape": [1]}):  # fmt: skip
        with pytest.raises(MicronetError, match="corrupted"):
            DataSpec.from_json({"inputs": [wrong]})
