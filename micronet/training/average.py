"""The average of a network's weights over the steps of a training."""

import torch
from torch import Tensor, nn

from micronet.graph import ops
from micronet.models.modes import copy_model

_WARM_UP = 10  # steps: the first averages forget faster, so that the random start does not linger


class WeightAverage(nn.Module):
    """The exponential moving average of parameters and of batch norms' statistics (Polyak and Juditsky 1992).

    Torch's ``AveragedModel`` averages all buffers or none; ranges and flags must be the latest, statistics averages.

    Attributes:
        model: A copy of the network, which holds the averages.
        decay: The share of itself that the average keeps in a step, 0..1.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.decay = copy_model(model), decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        norms = [f"{name}." for name, module in model.named_modules() if isinstance(module, ops.BATCH_NORMS)]
        self._averaged = {name for name, _ in model.named_parameters()}
        self._averaged |= {name + statistic for name in norms for statistic in ("running_mean", "running_var")}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step."""
        self.steps += 1
        count = int(self.steps)
        decay = min(self.decay, count / (count + _WARM_UP))
        latest = model.state_dict()
        for name, own in self.model.state_dict().items():
            if name in self._averaged and own.is_floating_point():
                own.lerp_(latest[name], 1 - decay)
            else:
                own.copy_(latest[name])
