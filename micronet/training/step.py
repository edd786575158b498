"""One optimizer step: batches in, weights changed; in 16 bits, compiled, over several processes where asked for."""

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from micronet.errors import MicronetError
from micronet.models.device import memory_format
from micronet.training import distributed
from micronet.training.config import TrainConfig
from micronet.training.distillation import Teacher

SGD_MOMENTUM = 0.9
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a model's trained parameters; those a module exempts are never decayed."""
    undecayed = {
        id(getattr(module, name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in undecayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.peak_lr)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=SGD_MOMENTUM, nesterov=True)


@dataclass
class TrainStep:
    """What is called once a step. ``compiled``: by torch.compile.

    ``penalty``: called between backward and the optimizer's step to add to the gradients.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    device: torch.device
    compiled: bool = False
    teacher: Teacher | None = None
    penalty: Callable[[], None] | None = None
    _network: Any = field(init=False)
    _layout: torch.memory_format = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        if self.config.amp == "fp16" and self.device.type != "cuda":
            raise MicronetError("--amp fp16 needs a GPU; use --amp bf16, or leave it out")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        self._layout = memory_format(self.model)
        self._network = _compile(self.model) if self.compiled else self.model

    def _spread(self, inputs: Tensor) -> None:
        """Let gradients be those of all processes. ``inputs``: any that the network takes."""
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels both layouts are the same one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name that the oldest torch we take has not
            self._network = DistributedDataParallel(
                self._network,
                broadcast_buffers=False,  # they agree by themselves, and some are replaced at every step
                find_unused_parameters=_leaves_some_out(self.model, inputs),
            )

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]], sizes: list[int]) -> float:
        """Change the weights by the mean gradient of some batches and return the mean loss, over all processes.

        ``batches``: this process's parts of them; ``sizes``: how many images each holds in all. Raises NotFiniteError,
        with the weights as they were, where the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for (images, labels), left in zip(batches, reversed(range(len(sizes))), strict=True):
            inputs = images.to(self.device, non_blocking=True, memory_format=self._layout)
            share = len(labels) / sum(sizes)
            if distributed.world_size() > 1 and not isinstance(self._network, DistributedDataParallel):
                self._spread(inputs)
            together = self._network.no_sync() if left and distributed.world_size() > 1 else nullcontext()
            with together:
                part = self._loss(inputs, labels.to(self.device, non_blocking=True)) * share
                # DDP averages over processes what is to be a sum
                self.scaler.scale(part * distributed.world_size()).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        value = float(distributed.sum_over_ranks(loss))
        if value != value or abs(value) == float("inf"):
            with self._precision():
                raise NotFiniteError(value, first_non_finite(self.model, inputs))
        if self.penalty is not None:
            self.scaler.unscale_(self.optimizer)
            self.penalty()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, _DTYPES.get(self.config.amp), enabled=self.config.amp != "off")

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with self._precision():
            scores = self._network(inputs)
            if not isinstance(scores, Tensor):  # auxiliary heads give several in training; the first counts
                scores = scores[0]
            loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
            return loss if self.teacher is None else self.teacher.blend(loss, scores, inputs)


class NotFiniteError(Exception):
    """A loss that is not finite, and the ``layer`` where that began, if one is to blame."""

    def __init__(self, loss: float, layer: str | None) -> None:
        super().__init__(f"the loss became {loss}")
        self.layer = layer


def _leaves_some_out(model: nn.Module, inputs: Tensor) -> bool:
    """Tell whether parameters get no gradient, as those of heads that do not count."""
    with torch.random.fork_rng():
        trial = copy.deepcopy(model)
        scores = trial(inputs)
        (scores if isinstance(scores, Tensor) else scores[0]).sum().backward()
    return any(parameter.requires_grad and parameter.grad is None for parameter in trial.parameters())


def _compile(model: nn.Module) -> Any:
    """Compile a network, but for the methods that its modules' classes name as ``eager``.

    Their classes do not say so to torch themselves, as that loads its compiler, which takes a second.
    """
    for kind in {type(module) for module in model.modules()}:
        for method in getattr(kind, "eager", ()):
            around = torch.compiler.disable(getattr(kind, method))  # type: ignore[no-untyped-call]
            setattr(kind, method, around)
    return torch.compile(model)


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: Tensor) -> str | None:
    """Return the name of the first module, in the order they run, that gives NaN or infinity for these inputs.

    Running statistics and ranges stay as they are: what moves are copies.
    """
    broken: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else None
