"""Multi-head attention with any number of heads; in torch's, the heads together are as wide as the embedding.

Each head computes softmax(q k^T / sqrt(d)) v; the heads' outputs are concatenated and projected (Vaswani et al. 2017,
arXiv:1706.03762, section 3.2). q, k, v and the output come from four linear layers.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from micronet.errors import MicronetError

Mask = Tensor | None
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attention(nn.Module):
    """A replacement of ``nn.MultiheadAttention`` whose ``num_heads`` follows from its layers' widths."""

    # torch.nn.TransformerEncoderLayer reads these to decide whether to use its fast path.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, head_dim: int, *, dropout: float = 0.0, batch_first: bool = False) -> None:
        """Make an attention without layers; ``from_torch`` adds them."""
        super().__init__()
        self.head_dim, self.dropout, self.batch_first = head_dim, dropout, batch_first

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> "Attention":
        """Return an equal attention with separate layers; gradients are copied. It must be ``is_splittable``."""
        split = cls(attention.head_dim, dropout=attention.dropout, batch_first=attention.batch_first)
        separate = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        weights = _thirds(attention.in_proj_weight) or separate
        biases = _thirds(attention.in_proj_bias) or [None] * 3
        last = attention.out_proj
        for name, weight, bias in zip(PROJECTIONS, [*weights, last.weight], [*biases, last.bias], strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight, layer.bias = weight, bias
            setattr(split, name, layer)
        return split.train(attention.training)

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return self.q_proj.out_features // self.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (N, L, E) and the attention weights.

        N comes second without ``batch_first``, and may be left out.

        Args:
            query, key, value: (N, L, E), (N, S, K) and (N, S, V).
            key_padding_mask: (N, S), bool (True: ignore) or float (added to the scores).
            need_weights: Whether to return the weights; otherwise None.
            attn_mask: (L, S) or (N * heads, L, S), bool or float likewise.
            average_attn_weights: Return the mean over heads, (N, L, S), instead of (N, heads, L, S).
            is_causal: A hint about ``attn_mask``; without that mask, MicronetError is raised.
        """
        if attn_mask is None and is_causal:
            raise MicronetError("is_causal is only a hint about attn_mask; pass attn_mask as well")
        q, k, v = (
            _split_heads(layer(x if self.batch_first else x.transpose(0, -2)), self.head_dim)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        masks, weights = (attn_mask, key_padding_mask), None
        if need_weights:
            weights = weigh(q, k, *masks, dropout=self.dropout, training=self.training)
            out = torch.matmul(weights, v)
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            out = attend(q, k, v, *masks, dropout=self.dropout, training=self.training)
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        return out if self.batch_first else out.transpose(0, -2), weights


def is_splittable(module: nn.Module) -> bool:
    """Return True if a module is an unmodified ``nn.MultiheadAttention`` that ``Attention`` can replace."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


@fx.wrap  # one node of a traced graph, because it branches on the masks' shapes
def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Mask, key_padding_mask: Mask, *, dropout: float, training: bool
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v: (..., heads, L, d) of q (..., heads, L, d), k and v (..., heads, S, d)."""
    mask = _merge_masks(q, attn_mask, key_padding_mask)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout if training else 0.0)


@fx.wrap
def weigh(q: Tensor, k: Tensor, attn_mask: Mask, key_padding_mask: Mask, *, dropout: float, training: bool) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), (..., heads, L, S), for q (..., heads, L, d) and k (..., heads, S, d)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mask = _merge_masks(q, attn_mask, key_padding_mask)
    return F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout, training)


def _merge_masks(q: Tensor, attn_mask: Mask, key_padding_mask: Mask) -> Mask:
    """Return both masks as one tensor to add to the scores (..., heads, L, S), or None."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        if mask.dim() == 3:  # (N * heads, L, S)
            mask = mask.view(*q.shape[:-2], *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype).unsqueeze(-2).unsqueeze(-2)  # (N, 1, 1, S)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores: of a bool mask, -inf for True."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(..., L, heads * d) -> (..., heads, L, d)."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)  # type: ignore[no-untyped-call]
    return heads


def _thirds(parameter: nn.Parameter | None) -> list[Any]:
    """Return the three parameters stacked in one, or nothing for None."""
    if parameter is None:
        return []
    parts = [nn.Parameter(part.clone(), parameter.requires_grad) for part in parameter.detach().chunk(3)]
    if parameter.grad is not None:
        for part, grad in zip(parts, parameter.grad.chunk(3), strict=True):
            part.grad = grad
    return parts
