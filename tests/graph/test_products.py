"""Products with stored matrices are linear layers, whatever operator computes them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet import load, prune, quantize, save
from micronet.graph.plain_weights import restore_plain_weights, with_plain_weights
from micronet.graph.trace import Graph

FORMS = {
    "at": lambda net, x: x @ net.w + net.b,
    "matmul": lambda net, x: torch.matmul(x, net.w),
    "addmm": lambda net, x: torch.addmm(net.b, x, net.w),
    "einsum": lambda net, x: torch.einsum("nd, dk -> nk", x, net.w) + net.b,
    "transposed": lambda net, x: torch.einsum("...d,kd->...k", x, net.w.T),
    "twice": lambda net, x: x @ net.w + (x @ net.w).relu(),
    "square": lambda net, x: x @ net.w @ net.square @ net.square.t(),
    "tied": lambda net, x: (x @ net.w @ net.w.t()) @ net.w,
}
LAYERS = {"twice": ["w_layer"], "square": ["w_layer", "square_computed_layer", "square_layer"]}
LAYERS["tied"] = ["w_computed_layer", "w_layer"]


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.w, self.b = form, nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("fixed", torch.randn(8, 8))

    def forward(self, x):
        return FORMS[self.form](self, x) @ self.fixed


@pytest.mark.parametrize("form", FORMS)
def test_a_product_with_a_parameter_is_a_linear_layer(form):
    torch.manual_seed(0)
    net, x = Net(form).eval(), torch.randn(3, 6)
    plain, result = with_plain_weights(net, x)
    torch.testing.assert_close(plain(x), net(x))
    linear = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    assert linear == LAYERS.get(form, ["w_layer"])  # not the buffer's
    restored = restore_plain_weights(copy.deepcopy(net), result)
    restored.load_state_dict(plain.state_dict())
    torch.testing.assert_close(restored(x), plain(x))


class Conv1D(nn.Module):
    """As GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.nf = outputs

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """Attention and what follows it, with sizes that the module holds; ``branch`` as torch.fx cannot trace it."""

    def __init__(self, branch=False):
        super().__init__()
        self.branch, self.width, self.heads, self.sizes = branch, 16, 4, [16, 16, 16]
        self.qkv, self.out, self._fc, self.proj = Conv1D(8, 48), Conv1D(16, 8), Conv1D(8, 32), Conv1D(32, 8)
        self.fc_nf = nn.Identity()  # takes the name that fc's size would have

    def forward(self, x):
        if self.branch and len(x) == 0:
            return x
        split = (*x.shape[:2], self.heads, self.width // 4)
        q, k, v = (each.reshape(split).transpose(1, 2) for each in self.qkv(x).split(self.sizes, 2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.fc_nf(x + self.out(y))
        return x + self.proj(self._fc(x).relu())


@pytest.mark.parametrize("branch", [False, True], ids=["traced", "recorded"])
def test_sizes_that_modules_hold_change_with_the_widths_of_products(branch, tmp_path):
    torch.manual_seed(0)
    net, x = Attention(branch).eval(), torch.randn(2, 5, 8)
    artifact = prune(net, x, percent=0.5, criterion="l2", scope="layer")
    assert artifact.model.get_submodule("qkv").out_features == 24
    assert artifact.model.get_submodule("_fc").out_features == 16
    assert (net.heads, net.sizes, net._fc.nf) == (4, [16, 16, 16], 32)
    save(artifact, tmp_path / "a.safetensors", build="tests.graph.test_products:Attention", args={"branch": branch})
    again = load(tmp_path / "a.safetensors", Attention(branch)).model.eval()
    assert torch.equal(again(x), artifact.model(x))
    assert again(x[:1]).shape == (1, 5, 8)


def test_a_matrix_that_is_only_read_transposed_keeps_its_name():
    net = nn.Sequential(Conv1D(6, 8), nn.ReLU()).eval()
    plain, _ = with_plain_weights(net, torch.randn(2, 3, 6))
    assert isinstance(plain.get_submodule("0"), nn.Linear)
    assert {name: tuple(value.shape) for name, value in plain.state_dict().items()} == {
        "0.weight": (8, 6), "0.bias": (8,),
    }  # fmt: skip


class LaterBias(Conv1D):
    """As a graph convolution has it: the bias is added after the product with the neighbours."""

    def forward(self, x):
        return x.mean(1, keepdim=True) @ x.mT @ (x @ self.weight) + self.bias


class ScaledConv(nn.Conv2d):
    """Has a bias that is not the convolution's."""

    def forward(self, x):
        return F.conv2d(x, self.weight) * 2 + self.bias.view(-1, 1, 1)


class OneBiasOfTwo(Conv1D):
    """Adds its bias to one of two products only."""

    def forward(self, x):
        return (x.relu() @ self.weight) + (x @ self.weight + self.bias).relu()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(LaterBias(6, 8), (2, 3, 6)), (OneBiasOfTwo(6, 8), (2, 6)), (ScaledConv(6, 8, 1), (2, 6, 3, 3))],
)
@pytest.mark.parametrize("purpose", ["running", "pruning", "training"])
def test_a_bias_that_forward_adds_elsewhere_is_not_the_layers(layer, shape, purpose):
    net, x = nn.Sequential(layer).eval(), torch.randn(shape)
    plain, _ = with_plain_weights(net, x, purpose)
    network = Graph(plain).model
    assert any(type(module) in (nn.Linear, nn.Conv2d) for module in network.modules())
    torch.testing.assert_close(network(x), net(x))


class Own(nn.Module):
    """A forward of the test's own over these tensors."""

    def __init__(self, forward):
        super().__init__()
        self.written = [forward]
        for name, shape in (("w", (6, 8)), ("b", (8,)), ("c", (8,)), ("one", (1,)), ("column", (6, 1)), ("v", (4, 8))):
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("pos", torch.randn(3, 6))

    def forward(self, x):
        return self.written[0](self, x)


@pytest.mark.parametrize(
    "forward", [lambda net, x: x @ net.w + net.one, lambda net, x: x @ net.column + net.b], ids=["wider", "narrower"]
)
def test_an_addition_that_changes_the_shape_or_broadcasts_is_no_bias(forward):
    net, x = Own(forward).eval(), torch.randn(3, 6)
    plain, _ = with_plain_weights(net, x)
    torch.testing.assert_close(plain(x), net(x))
    [layer] = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    assert layer.bias is None


def test_products_that_do_not_suit_leave_other_computed_weights_plain():
    def forward(net, x):
        y = (x @ net.w + net.b) * (x.relu() @ net.w + net.c)
        return F.linear(y, net.v - net.v.mean())

    net, x = Own(forward).eval(), torch.randn(3, 6)
    plain, result = with_plain_weights(net, x)
    torch.testing.assert_close(plain(x), net(x))
    assert "v" in result["computed"]


def test_weights_stay_tied_where_a_training_may_follow():
    torch.manual_seed(0)
    for form, purposes in {"tied": ["running"], "matmul": ["running", "pruning", "training"]}.items():
        net, x = Net(form).eval(), torch.randn(3, 6)
        made = [each for each in ("running", "pruning", "training") if with_plain_weights(net, x, each)[1]]
        assert made == purposes


def test_weights_may_be_computed_with_constants():
    def forward(net, x):
        return F.linear(x, net.v[:, :6] * torch.full((1,), 2.0)) @ torch.eye(4)

    net, x = Own(forward).eval(), torch.randn(3, 6)
    for purpose in ("running", "pruning"):
        plain, result = with_plain_weights(net, x, purpose)
        torch.testing.assert_close(plain(x), net(x))
        assert result["computed"] == ["v_computed"]


def test_sizes_may_be_multiplied_by_zero():
    def forward(net, x):
        y = x @ net.w
        return torch.cat([y[:, i * net.part : (i + 1) * net.part] for i in range(2)], 1) @ net.v.t()

    net, x = Own(forward).eval(), torch.randn(3, 6)
    net.part = 4
    plain, _ = with_plain_weights(net, x)
    torch.testing.assert_close(plain(x), net(x))


def test_a_training_goes_on_computing_weights():
    def forward(net, x):
        return F.linear(x @ net.w, net.v - net.v.mean())

    net, x = Own(forward).eval(), torch.randn(3, 6)
    assert with_plain_weights(net, x, "training") == (net, {})
    result = with_plain_weights(net, x, "pruning")[1]
    assert (result["computed"], result["transposed"]) == (["v"], ["w"])


@pytest.mark.parametrize("head", ["linear", "matmul"])
def test_the_tied_head_of_a_language_model_is_a_layer(head, tmp_path):
    net, x = Tied(head).eval(), torch.randint(0, 20, (4, 3))
    artifact = quantize(net, data=[x], mode="ptq", task="agreement")
    assert artifact.left_float == {}
    assert artifact.model.get_submodule("wte_weight_layer").weight is artifact.model.get_submodule("wte").weight
    save(artifact, tmp_path / "a.safetensors", build="tests.graph.test_products:Tied", args={"head": head})
    again = load(tmp_path / "a.safetensors", Tied(head)).model.eval()
    assert torch.equal(again(x), artifact.model.eval()(x))


class Tied(nn.Module):
    """A language model that scores words by their embeddings."""

    def __init__(self, head):
        super().__init__()
        self.head, self.wte, self.fc = head, nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.fc(self.wte(x))
        return F.linear(h, self.wte.weight) if self.head == "linear" else h @ self.wte.weight.T


def test_products_in_another_form_are_named():
    net = Own(lambda net, x: torch.einsum("nd,dk->kn", x, net.w) + torch.mm(x.t().relu(), x).sum())
    fc = nn.Sequential(nn.Linear(6, 6), net).eval()
    artifact = quantize(fc, data=[torch.randn(3, 6)], mode="ptq", task="agreement")
    assert artifact.left_float.keys() == {"einsum()", "mm()"}


def test_a_network_without_products_stays_as_it_is():
    net = Own(lambda net, x: torch.stack([row + net.pos[0] for row in x.unbind(1)], 1)).eval()
    assert with_plain_weights(net, torch.randn(2, 3, 6)) == (net, {})


def test_a_record_from_before_products_were_layers_keeps_its_names():
    net = Own(lambda net, x: F.linear(x, net.w.t(), net.b)).eval()
    restored = restore_plain_weights(net, {"computed": ["w_computed"], "stored": []})
    assert "w_computed_layer.weight" in restored.state_dict()
