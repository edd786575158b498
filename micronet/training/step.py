"""One optimizer step: batches in, weights changed; optionally in 16 bits, compiled, or shared by several ranks."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from micronet.errors import MicronetError
from micronet.models.device import memory_format, place_inputs
from micronet.models.uncompiled import uncompiled_optimizer
from micronet.tasks.classification import DEFAULT_TASK
from micronet.tasks.task import Outputs, Task, describe, outputs_of
from micronet.training import distributed
from micronet.training.average import WeightAverage
from micronet.training.config import TrainConfig
from micronet.training.distillation import Teacher
from micronet.training.gradients import add_gradients
from micronet.training.muon import Muon, find_matrices
from micronet.training.synchronized import synchronized_batch_norm

SGD_MOMENTUM = 0.9
SCALE_LR_FACTOR = 10.0  # a short training has to move scales far (BENCHMARKS.md, "Learned scales")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": uncompiled_optimizer(torch.optim.Adam),
    "sgd": partial(uncompiled_optimizer(torch.optim.SGD), momentum=SGD_MOMENTUM, nesterov=True),
    "muon": uncompiled_optimizer(Muon),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return an optimizer of all parameters that require gradients.

    Parameters that a module lists in ``learned_scales`` are never decayed, and have a higher learning rate, by the
    factor ``lr_factor`` of their group. Raises MicronetError if no parameter requires gradients.
    """
    scales = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "learned_scales", ())}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise MicronetError("all parameters of the network are frozen; call requires_grad_(True) on those to train")
    kinds = find_matrices(model) if config.chosen("optimizer") == "muon" else {}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in sorted(trained, key=lambda each: id(each) in scales):
        is_scale, kind = id(parameter) in scales, kinds.get(parameter, {})
        options: dict[str, Any] = {"weight_decay": 0.0 if is_scale else config.weight_decay, **kind}
        if is_scale:
            options["lr_factor"] = SCALE_LR_FACTOR
        groups.setdefault((is_scale, *kind.items()), {"params": [], **options})["params"].append(parameter)
    return OPTIMIZERS[config.chosen("optimizer")](list(groups.values()), lr=config.peak_lr)


@dataclass
class TrainStep:
    """A callable that takes one optimizer step; ``RunContext`` describes ``compiled``, ``TrainHooks`` ``penalty``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    device: torch.device
    compiled: bool = False
    teacher: Teacher | None = None
    penalty: Callable[[], None] | None = None
    task: Task = DEFAULT_TASK
    scaler: torch.amp.GradScaler = field(init=False)
    average: WeightAverage | None = field(init=False)

    def __post_init__(self) -> None:
        amp, decay = self.config.chosen("amp"), self.config.chosen("ema")
        if amp == "fp16" and self.device.type == "cpu":
            raise MicronetError("--amp fp16 needs a GPU; use --amp bf16, or drop --amp")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.average = WeightAverage(self.model, decay) if decay else None
        self._layout = memory_format(self.model)
        self.task = self.task.smoothed(self.config.chosen("label_smoothing"))
        self._network: Any = torch.compile(self.model) if self.compiled else self.model

    def __call__(self, batches: Iterable[tuple[Any, Any]], sizes: list[int]) -> float:
        """Update the weights with the mean gradient of some batches and return the mean loss, both over all ranks.

        ``batches``: this rank's part of each batch, images (N, C, H, W) and labels (N,), or the inputs and targets of
        another task. ``sizes``: the number of samples in each whole batch. Raises NotFiniteError if the loss is NaN or
        infinite; the weights are unchanged.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        with synchronized_batch_norm():
            for (given, targets), left in zip(batches, reversed(range(len(sizes))), strict=True):
                inputs = place_inputs(given, self.device, self._layout)
                loss += self._backward(inputs, targets, share=len(inputs[0]) / sum(sizes), more_follow=left > 0)
            value = float(distributed.sum_over_ranks(loss))
            if not math.isfinite(value):
                with self._precision():
                    raise NotFiniteError(value, first_non_finite(self.model, inputs))
        if self.penalty is not None:
            self.scaler.unscale_(self.optimizer)
            self.penalty()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return value

    @property
    def result(self) -> nn.Module:
        """The network that is validated: the average over the steps, if there is one."""
        return self.model if self.average is None else self.average.model

    def _backward(self, inputs: tuple[Tensor, ...], targets: Any, *, share: float, more_follow: bool) -> Tensor:
        """Add the gradients of ``share`` times the loss and return that product; ranks exchange after the last."""
        ranks = distributed.world_size()
        if ranks > 1 and not isinstance(self._network, DistributedDataParallel):
            self._network = _data_parallel(self._network, self.model, inputs)
        with self._network.no_sync() if more_follow and ranks > 1 else nullcontext():
            there = tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), targets)
            part = self._loss(inputs, there) * share
            # DistributedDataParallel averages the gradients over ranks; their sum is needed.
            add_gradients(self.scaler.scale(part * ranks))
        return part.detach()

    def _loss(self, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        with self._precision():
            outputs = outputs_of(self._network(*inputs))
        # A user's loss must not meet 16 bits; cross-entropy is in float32 under autocast anyway.
        with self._precision() if self.task.has_classes else nullcontext():
            if not self.task.has_classes:
                outputs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, outputs)
            loss = self.task.loss(outputs, targets)
            if self.teacher is not None:
                loss = self.teacher.blend(loss, outputs, inputs, self.task)
        _check_gradients(loss, outputs)
        return loss

    def _precision(self) -> torch.autocast:
        amp = self.config.chosen("amp")
        return torch.autocast(self.device.type, _DTYPES.get(amp), enabled=amp != "off")


def _check_gradients(loss: Tensor, outputs: Outputs) -> None:
    """Raise MicronetError if a loss has no gradients."""
    if loss.requires_grad:
        return
    if _with_gradients(outputs):
        raise MicronetError("the task's loss has no gradients; compute it from the outputs with tensor operations")
    raise MicronetError(
        f"the loss does not depend on the weights: the network's outputs, {describe(outputs)}, have no gradients; "
        "return scores, or quantize with --mode ptq, which does not train"
    )


def _with_gradients(outputs: Outputs) -> list[Tensor]:
    return [each for each in ([outputs] if isinstance(outputs, Tensor) else outputs) if each.requires_grad]


class NotFiniteError(Exception):
    """The loss became NaN or infinite; ``layer`` is the first layer with such an output, or None."""

    def __init__(self, loss: float, layer: str | None) -> None:
        super().__init__(f"the loss became {loss}" + (f", starting in layer {layer}" if layer else ""))
        self.layer = layer


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> str | None:
    """Return the name of the first module, in order of execution, whose output has NaN or infinity, or None.

    Buffers (running statistics, ranges) are left unchanged.
    """
    found: list[str] = []

    def check(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    hooks = [module.register_forward_hook(partial(check, name)) for name, module in model.named_modules() if name]
    try:
        functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def _data_parallel(network: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> DistributedDataParallel:
    """Wrap a network, compiled or not, so that gradients are averaged over ranks; ``inputs``: any valid input."""
    with torch.random.fork_rng():
        trial = copy.deepcopy(model)
        for output in _with_gradients(outputs_of(trial(*inputs)))[:1]:  # if there is none, the loss says so
            output.sum().backward()  # type: ignore[no-untyped-call]
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in trial.parameters())
    return DistributedDataParallel(
        network,
        broadcast_buffers=False,  # buffers are equal on all ranks already, and some are replaced at every step
        find_unused_parameters=unused,  # for example those of auxiliary heads
    )
