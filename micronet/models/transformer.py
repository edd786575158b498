"""torch's transformers with forwards that can be traced, and whose attention may be ours.

Each is torch's class with another forward: the same results without branches on shapes, and without the fast path that
bypasses the layers and reads the tensors of ``nn.MultiheadAttention``. (The fast path returns 0 at padded positions;
here they hold the layers' outputs, as in torch's own training.) ``is_causal`` is only a hint about the mask, so it is
not passed on.
"""

import copy

from torch import Tensor, nn

from micronet.models.attention import Attention, Mask, is_splittable
from micronet.models.cells import Cell, is_cell


class EncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and two linear layers."""

    def forward(
        self, src: Tensor, src_mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool = False
    ) -> Tensor:
        """(N, S, E) -> (N, S, E); (S, N, E) -> (S, N, E) without ``batch_first``."""
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask))
        out: Tensor = self.norm2(src + self._ff_block(src))
        return out


class Encoder(nn.TransformerEncoder):
    """Encoder layers, one after the other."""

    def forward(
        self, src: Tensor, mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool | None = None
    ) -> Tensor:
        """(N, S, E) -> (N, S, E); (S, N, E) -> (S, N, E) without ``batch_first``."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's forward, which can be traced in a class outside torch."""


class Decoder(nn.TransformerDecoder):
    """Decoder layers, one after the other."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Mask = None,
        memory_mask: Mask = None,
        tgt_key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(N, T, E) and (N, S, E) -> (N, T, E); N second without ``batch_first``."""
        for layer in self.layers:
            tgt = layer(
                tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )  # fmt: skip
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    """An encoder and a decoder."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Mask = None,
        tgt_mask: Mask = None,
        memory_mask: Mask = None,
        src_key_padding_mask: Mask = None,
        tgt_key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(N, S, E) and (N, T, E) -> (N, T, E); N second without ``batch_first``."""
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        out: Tensor = self.decoder(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )  # fmt: skip
        return out


# torch's class -> ours
_TRACEABLE = {ours.__base__: ours for ours in (EncoderLayer, Encoder, DecoderLayer, Decoder, Transformer)}


def splittable_attentions(model: nn.Module) -> list[str]:
    """Return the names of torch's attentions whose heads can be cut."""
    return [name for name, module in model.named_modules() if is_splittable(module)]


def splittable_layers(model: nn.Module) -> list[str]:
    """Return the names of torch's attentions and recurrent cells, which hold the weights of several linear layers."""
    return [name for name, module in model.named_modules() if is_splittable(module) or is_cell(module)]


def with_split_layers(model: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy of a network with some layers split; the other tensors are shared with the network.

    Raises RuntimeError if the network cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return split_layers(copy.deepcopy(model, shared), names)


def split_layers(model: nn.Module, names: list[str]) -> nn.Module:
    """Replace attentions by ``Attention`` and cells by ``Cell`` in place, and torch's transformers by traceable ones.

    Module names stay the same; only the own tensors of what is replaced are renamed.

    Returns:
        The network; a new object only if ``model`` itself is replaced.

    Raises:
        AttributeError: A name does not exist.
        ValueError: A named module is neither an attention nor a cell of torch's that can be split.
    """
    split: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if is_cell(module):
            split[module] = Cell.from_torch(module)  # type: ignore[arg-type]
        elif is_splittable(module):
            split[module] = Attention.from_torch(module)  # type: ignore[arg-type]
        else:
            raise ValueError(f"{name} is neither an attention nor a recurrent cell that can be split")
    model = _replace(model, split)
    around = [module for module in model.modules() if any(isinstance(inner, Attention) for inner in module.modules())]
    return _replace(model, {module: _traceable(module) for module in around if type(module) in _TRACEABLE})


def _traceable(module: nn.Module) -> nn.Module:
    """Return a module of the traceable class with the same state, child tables included."""
    kind = _TRACEABLE[type(module)]
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for child, inner in parent._modules.items():
            if inner in new:
                parent._modules[child] = new[inner]
    return new.get(model, model)
