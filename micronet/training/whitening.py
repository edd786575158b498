"""Whitening: a first convolution whose outputs are decorrelated, computed from training images before any step."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.data.batches import Normalize
from micronet.data.dataset import Dataset, images_of
from micronet.data.split import random_subset
from micronet.errors import MicronetError, count
from micronet.graph.trace import trace

PIXELS, LEAST_IMAGES = 2**20, 64  # to draw patches from: 1,024 images of 32x32, or 64 of 224x224
LARGEST_KERNEL = 7
_FLOOR = 5e-4  # added to the variances, of pixels of variance 1, so that noise is not blown up


def whiten(model: nn.Module, data: Dataset) -> None:
    """Set half of the first convolution's filters to the principal whitening filters of patches, and their negatives.

    A ReLU keeps one sign of each (Jordan 2024, arXiv:2404.00498, section 3.2). The weight keeps its norm.
    Raises MicronetError if the network does not begin with a fitting convolution.
    """
    layer = whitened_layer(model)
    train = images_of(data.train)
    _, height, width = train.image_shape
    images = random_subset(train, max(LEAST_IMAGES, PIXELS // (height * width)), seed=0)
    chosen = torch.arange(len(images))
    normal = Normalize(data.spec)(images.separate(images.images(chosen), chosen)[0])
    filters = whitening_filters(normal, layer.kernel_size[0], layer.kernel_size[1], len(layer.weight) // 2)
    with torch.no_grad():
        norm, count = layer.weight.norm(), len(filters)
        layer.weight[: 2 * count] = torch.cat([filters, -filters]).to(layer.weight)
        layer.weight *= norm / layer.weight.norm()


def whitening_filters(images: Tensor, height: int, width: int, most: int) -> Tensor:
    """Return at most ``most`` filters (F, C, height, width) whose outputs are uncorrelated, of variance nearly 1.

    Filters of large variance come first; directions without variance are left out. ``images``: (N, C, H, W) float32.
    """
    patches: Tensor = F.unfold(images, (height, width), stride=(height, width)).transpose(1, 2).flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    scaled = (directions / (variances + _FLOOR).sqrt()).T.flip(0)
    kept = int((variances > 1e-6 * variances[-1]).sum())
    filters: Tensor = scaled[: min(most, kept)].reshape(-1, images.shape[1], height, width).float()
    return filters


def whitened_layer(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that ``whiten`` sets; raise MicronetError with the reason if there is none."""
    graph = trace(model)
    if graph is None:
        raise MicronetError(
            "--whiten on requires a network that torch.fx can trace, to find its first layer; drop --whiten"
        )
    used = [user for node in graph.fx.nodes if node.op == "placeholder" for user in node.users]
    layer = graph.module(used[0]) if len(used) == 1 else None
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1:
        found = type(layer).__name__ if layer is not None else str(used[0].target) if used else "nothing"
        raise MicronetError(
            f"--whiten on requires a network that starts with a Conv2d without groups, not {found}; drop --whiten"
        )
    if max(layer.kernel_size) > LARGEST_KERNEL or len(layer.weight) < 4:
        size = "x".join(map(str, layer.kernel_size))
        raise MicronetError(
            f"--whiten on requires a first convolution with a kernel of at most {LARGEST_KERNEL}x{LARGEST_KERNEL} "
            f"pixels and at least 4 filters; this one has {count(len(layer.weight), 'filter')} of {size}; drop --whiten"
        )
    return layer
