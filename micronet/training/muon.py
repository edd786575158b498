"""Muon: momentum whose matrices are orthogonalized before each step; Adam for all that is not a matrix.

Torch's own ``torch.optim.Muon`` refuses convolutions, and computes in bfloat16, which most processors emulate.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from micronet.graph import ops
from micronet.graph.trace import trace

MOMENTUM = 0.6  # of batches of 128 images
RELATIVE_STEP = 10.0  # a matrix moves by lr * RELATIVE_STEP of its norm, so that Adam's default lr of 0.01 fits both
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients
ITERATIONS = 5
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
_NORMS = (*ops.BATCH_NORMS, *ops.INSTANCE_NORMS, nn.GroupNorm)  # their output ignores the scale of their input


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, Adam for everything else.

    A step moves a matrix W in the direction U V^T, where U S V^T is its gradient with Nesterov momentum, by
    ``lr * RELATIVE_STEP`` of its norm (You et al. 2017, arXiv:1708.03888: layers differ in scale). Weight decay is
    apart from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        params: Parameter groups. ``groups``: the number of matrices in each weight (out, in, *kernel), split along its
            first axis; 0: Adam. ``keep_norm``: without weight decay, each step ends with the norm that the weight had
            before the first, which changes nothing but the size of later steps if a normalization follows.
        lr: Adam's learning rate.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "groups": 0, "keep_norm": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; return the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = self._matrix_step if group["groups"] else self._adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _matrix_step(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["norm"] = weight.norm()
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        matrices = gradient.add(momentum, alpha=MOMENTUM).reshape(group["groups"], len(weight) // group["groups"], -1)
        size = group["lr"] * RELATIVE_STEP / (len(matrices) * min(matrices.shape[1:])) ** 0.5
        weight.sub_(orthogonalize(matrices).reshape(weight.shape).mul_(weight.norm() * size))
        if group["keep_norm"] and not group["weight_decay"]:
            weight.mul_(state["norm"] / weight.norm())
        else:
            weight.mul_(1 - group["lr"] * group["weight_decay"])

    def _adam_step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; the parts of complex numbers are two numbers each."""
        if parameter.is_complex():
            parameter, gradient = torch.view_as_real(parameter), torch.view_as_real(gradient)
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - ADAM_BETAS[0])
        square = state["square"].mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
        rest = [1 - beta ** state["step"] for beta in ADAM_BETAS]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, (square / rest[1]).sqrt_().add_(ADAM_EPS), value=-group["lr"] / rest[0])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return nearly U V^T of each matrix U S V^T: singular values become 0.7 to 1.2, tiny ones stay small.

    Args:
        matrices: (batch, rows, columns), floats.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def find_matrices(model: nn.Module) -> dict[nn.Parameter, dict[str, Any]]:
    """Return the weights that Muon steps as matrices, with the options of their parameter groups.

    Those are the weights of convolutions, linear layers and attention's projections. Left to Adam are those that are
    none (depthwise kernels, embeddings, scales, biases) or complex, the layers whose outputs are the network's scores,
    unless a norm follows (their norm is the scores' confidence), and weights of zeros, which have no direction yet.
    """
    found: dict[nn.Parameter, dict[str, Any]] = {}
    heads, normalized = _read_graph(model)
    for module in model.modules():
        own = module._parameters
        if isinstance(module, nn.MultiheadAttention) and isinstance(own.get("in_proj_weight"), nn.Parameter):
            found[module.in_proj_weight] = {"groups": 3, "keep_norm": False}
        weight = own.get("weight")
        if not isinstance(module, ops.ROW_LAYERS) or not isinstance(weight, nn.Parameter) or module in heads:
            continue
        groups = getattr(module, "groups", 1)
        if min(len(weight) // groups, weight[0].numel()) > 1 and bool(weight.detach().any()):
            found[weight] = {"groups": groups, "keep_norm": module in normalized}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found.pop(module._parameters["weight"], None)  # type: ignore[arg-type]  # tied to a linear layer
    return {weight: options for weight, options in found.items() if not weight.is_complex()}


def _read_graph(model: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """Return the layers that compute the network's outputs without a norm, and those followed by norms alone."""
    normalized = {each for each in model.modules() if getattr(each, "norm", None) is not None}  # folded while training
    graph = trace(model)
    if graph is None:
        layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, ops.ROW_LAYERS)]
        return set(layers[-1:]) - normalized, normalized
    for node, module in graph.calls():
        if node.users and all(isinstance(graph.module(user), _NORMS) for user in node.users):
            normalized.add(module)
    heads: set[nn.Module] = set()
    waiting: list[fx.Node] = [node for node in graph.fx.nodes if node.op == "output"]
    seen = set(waiting)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            layer = graph.module(source)
            if isinstance(layer, ops.ROW_LAYERS):
                heads.add(layer)
            elif source not in seen:
                seen.add(source)
                waiting.append(source)
    return heads - normalized, normalized
