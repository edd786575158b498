"""Every operator that tracing, quantization and pruning know, in families.

A family lists one operation in its three spellings: modules, functions and tensor methods. The first part names plain
operations. The second part groups them by what they do to values (for quantization) and to channels (for pruning).
"""

import operator
from dataclasses import dataclass
from inspect import isfunction

import torch
from torch import fx, nn
from torch.nn import functional as F

from micronet.models.attention import attend, weigh
from micronet.models.layers import Add, ChannelShuffle, Tap


@dataclass(frozen=True)
class Family:
    """Operators that do the same thing; a function may be given by its full name, to spare an import."""

    modules: tuple[type[nn.Module], ...] = ()
    functions: frozenset[object] = frozenset()
    methods: frozenset[str] = frozenset()

    def __or__(self, other: "Family") -> "Family":
        return Family(self.modules + other.modules, self.functions | other.functions, self.methods | other.methods)

    def matches(self, node: fx.Node, module: nn.Module | None = None) -> bool:
        """Return True if a traced node applies one of these operators; ``module``: the one that the node calls."""
        if node.op == "call_module":
            return isinstance(module, self.modules)
        if node.op == "call_method":
            return node.target in self.methods
        return node.target in self.functions or full_name(node.target) in self.functions


def full_name(target: object) -> str:
    """Return the name of a class or function with that of its module."""
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"


def _family(modules: tuple[type[nn.Module], ...] = (), functions: tuple[object, ...] = (), methods: str = "") -> Family:
    return Family(modules, frozenset(functions), frozenset(methods.split()))


# Layers with weights.
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
FORWARD_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
ROW_LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear  # their weights are (outputs, inputs, ...)
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
WEIGHTED_FUNCTIONS = _family(functions=(
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
))  # fmt: skip
DEFORMABLE_MODULE = "torchvision.ops.deform_conv.DeformConv2d"
DEFORMABLE_CONVOLUTION = _family(functions=("torch._ops.torchvision.deform_conv2d",))
MATMUL = _family(functions=(torch.matmul, torch.bmm, operator.matmul), methods="matmul bmm")
EINSUM = _family(functions=(torch.einsum,))
ATTENTION = _family(functions=(F.scaled_dot_product_attention, attend, weigh))

# Activations.
RELU = _family((nn.ReLU,), (F.relu, torch.relu), "relu relu_")
RELU6 = _family((nn.ReLU6,), (F.relu6,))
SIGMOID = _family((nn.Sigmoid, nn.Hardsigmoid), (F.sigmoid, torch.sigmoid, F.hardsigmoid), "sigmoid")
SOFTMAX = _family((nn.Softmax,), (F.softmax, torch.softmax), "softmax")
OTHER_ACTIVATIONS = _family(
    (nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.CELU,
     nn.SELU, nn.LogSigmoid, nn.Softsign),
    (F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.tanh, torch.tanh, F.hardswish, F.hardtanh, F.softplus, torch.clamp),
    "tanh clamp",
)  # fmt: skip

# Pools, sums and joins.
MAX_POOL = _family(
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    (torch.max_pool2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d),
)
AVERAGE_POOL = _family(
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
RESAMPLE = _family((nn.LPPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), (F.interpolate,))
MAX_UNPOOL = _family((nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d), (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d))
MEAN = _family(functions=(torch.mean,), methods="mean")
ADD = _family((Add,), (operator.add, operator.iadd, torch.add), "add add_")
MULTIPLY = _family(functions=(operator.mul, operator.imul, torch.mul, torch.multiply), methods="mul mul_")
CONCATENATE = _family(functions=(torch.cat, torch.concat, torch.concatenate))

# Values in another place or shape.
RESHAPE = _family(
    (nn.Flatten, nn.Unflatten),
    (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
     torch.split),
    "flatten view reshape permute transpose squeeze unsqueeze chunk split",
)  # fmt: skip
IDENTITY = _family((nn.Identity, Tap))
SHUFFLES = ChannelShuffle, nn.ChannelShuffle
CHANNEL_SHUFFLES = torch.channel_shuffle, F.channel_shuffle
REARRANGE = _family(
    (*SHUFFLES, nn.PixelShuffle, nn.PixelUnshuffle),
    (torch.unbind, torch.roll, torch.flip, torch.narrow, torch.select, torch.swapaxes, torch.movedim, torch.stack,
     torch.tile, torch.ravel, torch.hstack, torch.vstack, torch.dstack, torch.tensor_split, torch.broadcast_to,
     torch.repeat_interleave,
     F.pixel_shuffle, F.pixel_unshuffle, *CHANNEL_SHUFFLES),
    "unbind roll flip narrow select swapaxes movedim expand expand_as reshape_as view_as repeat unflatten t tile ravel "
    "tensor_split broadcast_to repeat_interleave",
)  # fmt: skip
DROPOUT = _family((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), (F.dropout,))

# Parts of a tensor that share its memory, and functions that write into it.
PART = _family(
    functions=(operator.getitem, torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind),
    methods="chunk split narrow select unbind",
)
# Elements that a mask selects, or the places of those: there may be none.
SELECTS = _family(
    functions=(
        operator.getitem, operator.setitem, torch.where, torch.nonzero, torch.argwhere, torch.masked_select,
        torch.masked_scatter,
    ),
    methods="where nonzero argwhere masked_select masked_scatter masked_scatter_",
)  # fmt: skip
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}

# Facts about a tensor other than its values.
METADATA = _family(methods="size dim ndimension numel element_size is_floating_point")
TUPLE_ATTRIBUTES = {"values", "indices", "min", "max"}  # of the named tuples that torch's functions return
COMPLEX_ATTRIBUTES = {"real", "imag"}
METADATA_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "is_cuda", "requires_grad"}
TRANSPOSING_ATTRIBUTES = {"T", "mT"}
VALUE_ATTRIBUTES = {"data"}  # the tensor itself

# For quantization: what happens to values.
KEEPS_MATRIX = nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Identity, Tap  # (N, features) stays a matrix
PRESERVES_VALUES = RESHAPE | MAX_POOL | DROPOUT | _family(
    (*SHUFFLES, nn.PixelShuffle, nn.PixelUnshuffle, nn.Identity),
    (torch.unbind, torch.roll, torch.flip, torch.narrow, torch.select, torch.swapaxes, torch.movedim,
     F.pixel_shuffle, F.pixel_unshuffle),
    "contiguous unbind roll flip narrow select swapaxes movedim expand expand_as reshape_as view_as repeat unflatten t",
)  # fmt: skip
PAD = _family((nn.modules.padding._ConstantPadNd,), (F.pad,))
ANY_RELU = RELU | RELU6
FUSED_BY_LINEAR = (
    RELU
    | SIGMOID
    | _family(  # what ONNX Runtime merges with a linear layer's float sums
        (nn.LeakyReLU, nn.Tanh, nn.ELU, nn.SELU, nn.Softplus, nn.Softsign),
        (F.leaky_relu, F.tanh, torch.tanh, F.elu, F.selu, torch.selu, F.softplus, F.softsign),
        "tanh",
    )
)
NON_NEGATIVE = ANY_RELU | SIGMOID | SOFTMAX
AVERAGE = AVERAGE_POOL | MEAN
JOIN = ADD | CONCATENATE
WEIGHTED = (
    WEIGHTED_FUNCTIONS
    | DEFORMABLE_CONVOLUTION
    | MATMUL
    | EINSUM
    | ATTENTION
    | _family(functions=(torch.mm, torch.addmm, torch.baddbmm, torch.tensordot), methods="mm addmm baddbmm")
)

# For pruning: what happens to channels.
MOVES_CHANNELS = RESHAPE | REARRANGE | CONCATENATE | _family(functions=(operator.getitem,))
ELEMENTWISE = ANY_RELU | SIGMOID | OTHER_ACTIVATIONS | DROPOUT | _family(
    (nn.Identity, nn.AlphaDropout, Tap),
    (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
     "torchvision.ops.stochastic_depth.stochastic_depth", torch.abs, torch.neg, torch.exp, torch.sqrt,
     torch.rand_like, torch.randn_like, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
     torch.bernoulli, torch.isnan, torch.isinf, torch.isfinite,
     torch.round, torch.floor, torch.ceil, torch.sign, torch.rsqrt, torch.reciprocal, torch.log, torch.erf,
     torch.pow, torch.square, operator.neg, operator.pow, operator.gt, operator.ge, operator.lt, operator.le),
    "contiguous float to detach clone abs neg exp sqrt type pow square half double bfloat16 type_as masked_fill "
    "bernoulli bernoulli_ round round_ floor floor_ ceil sign rsqrt reciprocal log erf",
)  # fmt: skip
BROADCASTS = ADD | _family(
    functions=(
        operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, torch.sub, torch.mul,
        torch.multiply, torch.div, torch.maximum, torch.minimum, torch.where, torch.eq, torch.ne, torch.lt,
        torch.le, torch.gt, torch.ge, operator.eq, operator.ne,
    ),
    methods="sub sub_ mul mul_ div div_ eq ne lt le gt ge",
)  # fmt: skip
MATCHES_CHANNELS = ELEMENTWISE | BROADCASTS
CREATES = _family(methods="new_empty new_zeros new_ones new_full")
GATES = _family((nn.GLU,), (F.glu,))  # one half of the channels times the sigmoid of the other
REDUCES = SOFTMAX | MEAN | _family(functions=(
    torch.sum, torch.amax, torch.amin, torch.any, torch.all, torch.count_nonzero,
), methods="sum amax amin any all count_nonzero")  # fmt: skip
POOLS_CHANNELS = MAX_POOL | MAX_UNPOOL | AVERAGE_POOL | RESAMPLE
MIXES_HEADS = ATTENTION | MATMUL | EINSUM
NORMALIZES_CHANNELS = _family(
    (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    (F.layer_norm, F.group_norm, F.rms_norm, F.local_response_norm, F.normalize),
)


def pads_with_zeros(node: fx.Node, module: nn.Module | None) -> bool:
    """Return True if a node only adds zeros around a tensor, and zero is on every grid."""
    if not PAD.matches(node, module):
        return False
    if module is not None:
        return bool(getattr(module, "value", None) == 0)
    given = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
    return bool(given.get("mode", "constant") == "constant" and given.get("value") in (None, 0, 0.0))


def is_opaque(node: fx.Node) -> bool:
    """Return True for a call of a Python function that is neither torch's nor ours: it may do anything inside."""
    written = node.op == "call_function" and isfunction(node.target)
    return written and not str(node.target.__module__).startswith(("torch.", "micronet."))


def writes_in_place(node: fx.Node) -> bool:
    """Return True if a call changes a tensor that others may read."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    changes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return changes or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul setitem".split()  # noqa: SIM905
_IN_PLACE = {*_OPERATORS, *(f"__{name}__" for name in _OPERATORS)}
