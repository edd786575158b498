"""torch's transformers with forwards that can be traced and whose attention may be ours.

Each is torch's class with another forward: the same numbers without torch's branches on shapes and without its
shortcut around the layers' modules, which reads an ``nn.MultiheadAttention``'s own tensors. (That shortcut leaves 0 at
padded positions; here they hold what the layers make of them, as in torch's own training.) ``is_causal`` only hints
at what a mask is, so it need not be passed on.
"""

import copy

from torch import Tensor, nn

from micronet.models.attention import Attention, is_splittable


class EncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and two linear layers."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(N, S, E) -> (N, S, E), (S, N, E) without ``batch_first``."""
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask))
        out: Tensor = self.norm2(src + self._ff_block(src))
        return out


class Encoder(nn.TransformerEncoder):
    """Encoder layers, one after the other."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """(N, S, E) -> (N, S, E), (S, N, E) without ``batch_first``."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's own forward, which can be traced where the class is not torch's."""


class Decoder(nn.TransformerDecoder):
    """Decoder layers, one after the other."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(N, T, E) and (N, S, E) -> (N, T, E), (T, N, E) and so on without ``batch_first``."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    """An encoder and a decoder."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(N, S, E) and (N, T, E) -> (N, T, E), (S, N, E) and so on without ``batch_first``."""
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        out: Tensor = self.decoder(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return out


_TRACEABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerEncoder: Encoder,
    nn.TransformerDecoderLayer: DecoderLayer,
    nn.TransformerDecoder: Decoder,
    nn.Transformer: Transformer,
}


def splittable_attentions(model: nn.Module) -> list[str]:
    """Return the names of torch's attentions that can have fewer heads."""
    return [name for name, module in model.named_modules() if is_splittable(module)]


def with_split_attentions(model: nn.Module) -> nn.Module:
    """Return a copy of a network with all its attentions split; it shares the other tensors with the network.

    Raises RuntimeError where the network cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return split_attentions(copy.deepcopy(model, shared), splittable_attentions(model))


def split_attentions(model: nn.Module, names: list[str]) -> nn.Module:
    """Give attentions layers of their own, in place, and torch's transformers around them a forward for that.

    Names stay, but for those of the attentions' own tensors. Raises AttributeError where a name is not there,
    ValueError where it is no attention of torch's.
    """
    replaced: dict[int, Attention] = {}
    for name in names:
        module = model.get_submodule(name)
        if not is_splittable(module):
            raise ValueError(f"{name} is no attention whose heads can be cut")
        replaced[id(module)] = Attention.from_torch(module)  # type: ignore[arg-type]
    for parent in list(model.modules()):
        for child, inner in parent._modules.items():
            if id(inner) in replaced:
                parent._modules[child] = replaced[id(inner)]
    for module in model.modules():
        if type(module) in _TRACEABLE and any(isinstance(inner, Attention) for inner in module.modules()):
            module.__class__ = _TRACEABLE[type(module)]
    return model
