"""Networks that take their tensors by name or in a dict, and that return structures of their own."""

from collections import OrderedDict
from dataclasses import dataclass, fields
from textwrap import dedent
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import micronet
from micronet.errors import MicronetError
from micronet.graph.trace import trace
from micronet.models.calling import input_names, plain_names, take_in_order, takes_names
from micronet.models.outputs import other_values, output_names, tensors_in

X, S = torch.rand(4, 3, 8, 8), torch.rand(4, 1)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def features(self, x, scale):
        return torch.relu(self.conv(x)).mean((2, 3)) * scale


class Keywords(Body):
    def forward(self, *, image, scale):
        return self.fc(self.features(image, scale))


class Anything(Body):
    def forward(self, **inputs):
        return self.fc(self.features(inputs["image"], inputs["scale"]))


class InDict(Body):
    def forward(self, batch: "dict[str, Tensor]"):
        return self.fc(self.features(batch["image"], batch["scale"]))


class Optional(Body):
    def forward(self, image, mask=None, scale=None):
        assert mask is None
        return self.fc(self.features(image, scale))


class Swapped(Body):
    def forward(self, scale, image):
        return self.fc(self.features(image, scale))


@pytest.mark.parametrize("kind", [Keywords, Anything, InDict, Optional, Swapped])
def test_inputs_reach_a_forward_by_their_names(kind, tmp_path):
    net = kind().eval()
    expected = net.fc(net.features(X, S))
    names, keys = ["image", "scale"], list(net.state_dict())
    take_in_order(net, [{"name": name} for name in names])
    assert takes_names(net) and input_names(net) == names and isinstance(net, kind)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(X, S), expected) and torch.equal(net(image=X, scale=S), expected)
    graph = trace(net)
    assert graph is not None and [str(node.target) for node in graph.fx.nodes if node.op == "placeholder"] == names
    take_in_order(net, [{"name": "scale"}, {"name": "image"}])
    assert torch.equal(net(S, X), expected)


def test_inputs_that_come_in_order_change_nothing():
    for net, names in ((Optional(), ["image"]), (Optional(), ["x", "y", "z"]), (nn.Linear(2, 2), ["a"]), (Body(), [])):
        take_in_order(net, [{"name": name} for name in names])
        assert not takes_names(net)
    net = Keywords()
    take_in_order(net)
    assert input_names(net) == ["image", "scale"]


def test_names_become_distinct_arguments():
    assert plain_names(["a.b", "a_b", "class", "self", "1"]) == ["a_b", "a_b_1", "input_class", "input_self", "input_1"]
    for names in (
        ["a_2", "a", "a"],
        ["\uff53elf", "\u017felf", "e\u0301", "\u00e9"],
    ):  # Python reads these as self and \u00e9
        take_in_order(net := Anything(), [{"name": name} for name in names])
        assert len(set(input_names(net))) == len(set(names))


@pytest.mark.parametrize("kind", [Keywords, InDict, Optional])
def test_networks_that_take_names_quantize_compare_prune_and_export(kind, tmp_path):
    batch = {"image": X, "scale": S}
    np.savez(tmp_path / "inputs.npz", scale=S.numpy(), image=X.numpy())  # in another order
    net = kind()
    quantized = micronet.quantize(net, data=[batch], mode="ptq")
    assert {"conv", "fc"}.isdisjoint(quantized.left_float)
    rows = micronet.compare([net, quantized], data=tmp_path / "inputs.npz", task="agreement", skip_timing=True)
    assert rows[0].loss == 0 and 0 < rows[1].loss < 0.1
    pruned = micronet.prune(net, batch, percent=0.5, criterion="l2")
    assert pruned.model.get_submodule("conv").out_channels == 4
    proto = micronet.export_onnx(quantized, batch)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    assert [entry.name for entry in session.get_inputs()] == ["image", "scale"]
    (found,) = session.run(None, {name: x.numpy() for name, x in batch.items()})
    with torch.no_grad():
        expected = quantized.model.eval()(**batch)
    np.testing.assert_allclose(found, expected, atol=float(expected.abs().max()) / 50)  # a few of 255 steps


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Plain:
    scores: Tensor
    more: list
    kind: str = "plain"


@dataclass
class Output(OrderedDict):
    """A dataclass that is a dict of its fields that are not None, as in transformers."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        for each in fields(self):
            if getattr(self, each.name) is not None:
                self[each.name] = getattr(self, each.name)


class Loose:
    def __init__(self, y):
        self.y, self.kind = y, "loose"


STRUCTURES = {
    "dict": (lambda y, h: {"y": y, "none": None, "kind": "text", "h": h}, ["y", "h"]),
    "pair": (Pair, ["a", "b"]),
    "dataclass": (lambda y, h: Plain(y, [h, None, 3]), ["scores", "more.0"]),
    "output": (lambda y, h: Output(logits=y, hidden=(h,)), ["logits", "hidden.0"]),
    "lists": (lambda y, h: [y, [None, {"h": h}]], ["output_1", "1.1.h"]),
    "tuple": (lambda y, h: (y, "text", h), ["output_1", "output_2"]),
    "one": (lambda y, h: {"y": y}, ["y"]),
    "object": (lambda y, h: Loose(y), ["y"]),
}


class Returning(Body):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        h = self.features(x, 1.0)
        return self.form(self.fc(h), h)


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_keep_their_structure_and_get_names_in_onnx(name):
    form, names = STRUCTURES[name]
    net = Returning(form).eval()
    returned = net(X)
    assert output_names(returned) == names
    graph = trace(net, X)
    if name == "object":
        assert graph is None
    else:
        traced = torch.fx.GraphModule(graph.model, graph.fx)(X)
        assert type(traced) is type(returned) and output_names(traced) == names
        assert other_values(traced) == other_values(returned)
        assert all(torch.equal(x, y) for x, y in zip(tensors_in(traced), tensors_in(returned), strict=True))
    quantized = micronet.quantize(net, data=[X], mode="ptq")
    proto = micronet.export_onnx(quantized, X)
    assert [entry.name for entry in proto.graph.output] == names


def test_outputs_may_have_the_names_of_inputs_and_of_inner_tensors():
    class Named(nn.Module):
        def forward(self, x, y):
            return {"x": x * 2, "relu": torch.relu(x) + y, "y": torch.relu(y)}

    session = onnxruntime.InferenceSession(micronet.export_onnx(Named(), (X, S[:, :, None, None])).SerializeToString())
    assert [entry.name for entry in session.get_outputs()] == ["x_out", "relu", "y_out"]


def test_files_of_networks_that_take_a_dict_load_and_evaluate(tmp_path):
    (tmp_path / "net.py").write_text(
        dedent(
            """
            from typing import NamedTuple
            from torch import Tensor, nn

            class Found(NamedTuple):
                scores: Tensor
                sizes: Tensor

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

                def forward(self, batch: dict):
                    h = self.conv(batch["image"]).relu().mean((2, 3)) * batch["scale"]
                    return Found(self.fc(h), h)
            """
        )
    )
    arrays = {"scale": torch.rand(12, 1).numpy(), "image": torch.rand(12, 3, 8, 8).numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    np.savez(tmp_path / "turned.npz", **dict(reversed(arrays.items())))
    name, data = f"{tmp_path}/net.py:Net", tmp_path / "data.npz"
    floating = micronet.import_model(model=name, data=data, task="agreement", output=tmp_path / "f.safetensors")
    assert [each["name"] for each in floating.data["inputs"]] == ["scale", "image"]
    quantized = micronet.quantize(
        tmp_path / "f.safetensors", model=name, mode="ptq", data=tmp_path / "turned.npz",
        output=tmp_path / "q.safetensors",
    )  # fmt: skip
    again = micronet.load(tmp_path / "q.safetensors", name)
    inputs = tuple(torch.from_numpy(x) for x in arrays.values())
    with torch.no_grad():
        ours, theirs = again.model(*inputs), quantized.model.eval()(*inputs)
    assert type(ours)._fields == ("scores", "sizes")
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_dict_for_a_network_that_takes_none_is_refused():
    with pytest.raises(MicronetError, match="a batch has no input, which forward"):
        micronet.quantize(nn.Linear(3, 2), data={"image": torch.rand(2, 3), "label": torch.ones(2)}, mode="ptq")


def test_two_inputs_for_a_forward_that_takes_one_tensor_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    take_in_order(net, [{"name": "left"}, {"name": "right"}])
    with pytest.raises(TypeError, match=r"one argument, input, so left and right were passed in a dict; .*conv2d"):
        net(X, X)
