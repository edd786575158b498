"""Calibration images where there are none: noise, changed until batch norms see the statistics they remember.

ZeroQ, Cai et al. 2020, arXiv:2001.00281, equation 3. Deviation: means and standard deviations are divided by the
remembered standard deviation, so that layers of large values do not outweigh the others.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.models.modes import eval_mode
from micronet.models.uncompiled import uncompiled_optimizer
from micronet.quantization.config import CALIBRATION_BATCH

_Adam = uncompiled_optimizer(torch.optim.Adam)

STEPS = 200
LEARNING_RATE = 0.1


class Synthesized(NamedTuple):
    """Images, and how far the statistics that they cause are from those remembered, before and after.

    The distance is the root mean square, over the channels of all batch norms, of the differences in mean and in
    standard deviation, as fractions of the remembered standard deviation.
    """

    batches: list[Tensor]
    before: float
    after: float


def synthesize_images(
    model: nn.Module, shape: tuple[int, int, int], count: int, seed: int, progress: Progress | None = None
) -> Synthesized:
    """Make batches of images from the statistics in a network's batch norms.

    Args:
        model: A float network with batch norms.
        shape: (C, H, W) of an image.
        count: The number of batches, of ``CALIBRATION_BATCH`` images each.
        seed: For the noise that the images begin as.
        progress: Where to report progress.

    Raises:
        MicronetError: The network has no batch norm with statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, ops.BATCH_NORMS) and module.track_running_stats]
    if not norms:
        raise MicronetError(
            "--calib-data none needs batch norms to generate images from, but this network has none; pass a folder "
            "of images"
        )
    progress = progress or Silent()
    device = next(iter(norms[0].buffers())).device
    generator = torch.Generator().manual_seed(seed)
    batches, ends = [], []
    with eval_mode(model), _recording(norms) as seen:
        for number in range(count):
            images = torch.randn(CALIBRATION_BATCH, *shape, generator=generator).to(device).requires_grad_()
            optimizer = _Adam([images], lr=LEARNING_RATE)
            distances: list[float] = []
            for step in range(STEPS):
                seen.clear()
                model(images)
                distance = _moments_apart(images, torch.zeros(1, device=device), torch.ones(1, device=device), 1)
                distance = torch.stack([*seen, distance]).mean()
                (images.grad,) = torch.autograd.grad(distance, [images])
                optimizer.step()
                distances.append(float(distance.detach()) ** 0.5)
                progress.step("generating images", number * STEPS + step + 1, count * STEPS, distance=distances[-1])
            batches.append(images.detach())
            ends.append((distances[0], distances[-1]))
    before, after = (sum(values) / count for values in zip(*ends, strict=True))
    return Synthesized(batches, before, after)


@contextmanager
def _recording(norms: list[Any]) -> Iterator[list[Tensor]]:
    """Inside this context, the list grows by a squared distance for every batch norm that runs."""
    seen: list[Tensor] = []

    def record(norm: Any, given: tuple[Tensor, ...]) -> None:
        deviation = (norm.running_var + norm.eps).sqrt()
        seen.append(_moments_apart(given[0], norm.running_mean, deviation, len(deviation)))

    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(record))
        yield seen


def _moments_apart(x: Tensor, mean: Tensor, deviation: Tensor, channels: int) -> Tensor:
    """Return the mean squared difference from a mean and a standard deviation, as fractions of the latter."""
    rows = x.transpose(0, 1).reshape(channels, -1)
    squared = (rows.mean(1) - mean).square() + (rows.var(1).add(1e-12).sqrt() - deviation).square()
    return (squared / deviation.square()).mean() / 2
