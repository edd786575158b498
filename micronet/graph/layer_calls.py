"""The functions of torch that apply a layer to an input, and the layers they apply."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from micronet.models.layers import BatchNorm

Tensors = Mapping[str, Any]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class LayerCall:
    """A function that applies a layer: its parameters in order, which of them are tensors, and what makes the layer."""

    parameters: str
    tensors: str
    make: Callable[[Tensors, Options], nn.Module]
    defaults: Options


def _convolution(kind: Any, tensors: Tensors, options: Options) -> nn.Module:
    rows, columns, *kernel = tensors["weight"].shape
    inputs, outputs = columns * options["groups"], rows
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        inputs, outputs = rows, columns * options["groups"]
    made: nn.Module = kind(inputs, outputs, kernel, bias=False, device="meta", **options)
    return made


def _linear(tensors: Tensors, options: Options) -> nn.Module:
    rows, columns = tensors["weight"].shape
    return nn.Linear(columns, rows, bias=False, device="meta")


def _batch_norm(tensors: Tensors, options: Options) -> nn.Module:
    values = next(tensor for tensor in tensors.values() if tensor is not None)
    return BatchNorm(
        len(values), options["eps"], options["momentum"], tensors["weight"] is not None,
        tensors["running_mean"] is not None, device="meta",
    )  # fmt: skip


def _layer_norm(tensors: Tensors, options: Options) -> nn.Module:
    return nn.LayerNorm(tuple(options["normalized_shape"]), options["eps"], device="meta")


def _group_norm(tensors: Tensors, options: Options) -> nn.Module:
    return nn.GroupNorm(options["num_groups"], len(tensors["weight"]), options["eps"], device="meta")


def _calls() -> dict[object, LayerCall]:
    conv, transposed = {"bias": None, "stride": 1, "padding": 0, "groups": 1, "dilation": 1}, {"output_padding": 0}
    norm = {"weight": None, "bias": None, "eps": 1e-5}
    found: dict[object, LayerCall] = {}
    for function, transpose, kind, back in (
        (F.conv1d, F.conv_transpose1d, nn.Conv1d, nn.ConvTranspose1d),
        (F.conv2d, F.conv_transpose2d, nn.Conv2d, nn.ConvTranspose2d),
        (F.conv3d, F.conv_transpose3d, nn.Conv3d, nn.ConvTranspose3d),
    ):
        found[function] = LayerCall(
            "input weight bias stride padding dilation groups", "weight bias", partial(_convolution, kind), conv
        )
        found[transpose] = LayerCall(
            "input weight bias stride padding output_padding groups dilation", "weight bias",
            partial(_convolution, back), {**conv, **transposed},
        )  # fmt: skip
    return found | {
        F.linear: LayerCall("input weight bias", "weight bias", _linear, {"bias": None}),
        F.batch_norm: LayerCall(
            "input running_mean running_var weight bias training momentum eps", "running_mean running_var weight bias",
            _batch_norm, {**norm, "training": False, "momentum": 0.1},
        ),
        F.layer_norm: LayerCall("input normalized_shape weight bias eps", "weight bias", _layer_norm, norm),
        F.group_norm: LayerCall("input num_groups weight bias eps", "weight bias", _group_norm, norm),
    }  # fmt: skip


CALLS = _calls()


def arguments_of(call: fx.Node) -> dict[str, Any]:
    """Return what one of the functions is given, by the names of its parameters."""
    function = CALLS[call.target]
    return {**function.defaults, **dict(zip(function.parameters.split(), call.args, strict=False)), **call.kwargs}
