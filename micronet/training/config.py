"""The settings of a training, what surrounds it, and the learning rate. No torch here, so ``--help`` stays fast."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micronet.core.config import Settings, setting
from micronet.core.progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from torch import nn

    from micronet.artifact.artifact import Artifact

ONE_CYCLE_RISE = 0.25  # share of the steps in which the learning rate rises
DEFAULT_LR = 0.01
DISTILLATION = ("distill", "distill_weight", "temperature")
# Recorded only if changed.
UNUSED = {
    "accumulate": 1, "amp": "off", "patience": None, "ema": 0.0, "flip": "random", "cutout": 0, "whiten": "off",
    "start_size": 0,
}  # fmt: skip
DEFAULT_PRESET: Literal["plain", "fast"] = "fast"
# What --preset chooses where the user chose nothing. ``training.preset`` fits it to the network, data and machine.
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {
        "batch_size": 64, "optimizer": "adam", "schedule": "one-cycle", "label_smoothing": 0.0, "amp": "off",
        "ema": 0.0, "flip": "random", "cutout": 0, "whiten": "off", "start_size": 0,
    },
    "fast": {
        "batch_size": 128, "optimizer": "muon", "schedule": "linear", "label_smoothing": 0.1, "amp": "bf16",
        "ema": 0.0, "flip": "alternating", "cutout": 0, "whiten": "on", "start_size": 0,
    },
}  # fmt: skip
LINEAR_RISE = 0.2  # share of the steps
GROWTH = 0.7  # share of the steps in which images grow from --start-size to their full size
STEP_DECAYS = (0.5, 0.75, 0.9)  # shares of the steps after which the learning rate is divided by ten


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Training."""

    preset: Literal["plain", "fast"] | None = setting(
        None,
        "Defaults for the options below. fast: Muon, linear schedule, label smoothing, alternating flips, whitened "
        "first layer in new networks, bf16 where it is known to be faster, and a batch size that depends on the number "
        "of images. plain: Adam, one-cycle schedule, none of these. Default: fast (sparse-train: plain).",
        basic=True,
    )
    epochs: int = setting(8, "Number of epochs; 0 skips training.", low=0, basic=True)
    lr: float | None = setting(
        None,
        "Peak learning rate. Default: 0.01 (with Muon 0.01 * sqrt(2000 / steps) beyond 2,000 steps; lower in finetune, "
        "quantize, and sparse-train of an artifact).",
        low=0,
        basic=True,
    )
    batch_size: int | None = setting(
        None, "Images per batch, across all processes. Default: 32 to 128, by the number of images; plain: 64.", low=1
    )
    accumulate: int = setting(1, "Number of batches to accumulate gradients over before each optimizer step.", low=1)
    amp: Literal["off", "bf16", "fp16"] | None = setting(
        None,
        "Mixed-precision training. bf16 needs a GPU or a CPU with bf16 instructions; fp16 needs a GPU and is "
        "untested. Default: bf16 on GPUs that support it, and on such CPUs for networks of convolutions; plain: off.",
    )
    patience: int | None = setting(
        None,
        "Stop after N epochs without improvement in validation accuracy (ties are broken by the loss).",
        low=1,
        metavar="N",
    )
    weight_decay: float = setting(0.0, "L2 penalty on the weights.", low=0)
    optimizer: Literal["adam", "sgd", "muon"] | None = setting(
        None,
        "Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the updates of matrices and kernels, "
        "scaled to 10 * --lr times their norm, and uses Adam for all other parameters. Default: muon; plain: adam.",
    )
    schedule: Literal["one-cycle", "linear", "step"] | None = setting(
        None,
        "Learning-rate schedule: warmup and decay to zero, with cosine (one-cycle) or linear ramps; or division by "
        "10 after 50%, 75% and 90% of the steps. Default: linear; plain: one-cycle.",
    )
    label_smoothing: float | None = setting(
        None,
        "Label smoothing: share of the target probability spread over all classes. Default: 0.1; plain: 0.",
        low=0, high=0.99,
    )  # fmt: skip
    ema: float | None = setting(
        None,
        "Decay of the exponential moving average of the weights, which is then validated and saved instead of the "
        "weights. Default: 0 (off).",
        low=0, high=0.99999, metavar="DECAY",
    )  # fmt: skip
    flip: Literal["random", "alternating"] | None = setting(
        None,
        "Horizontal flips: of a random half of the images in each epoch, or of every image in every other epoch. "
        "Default: alternating; plain: random.",
    )
    cutout: int | None = setting(
        None, "Gray out a random NxN square in each training image. Default: 0 (off).", low=0, metavar="N"
    )
    whiten: Literal["on", "off"] | None = setting(
        None,
        "Initialize the first convolution to whiten (decorrelate) the pixels of the training images. Default: on "
        "in new networks that start with a convolution; plain: off.",
    )
    start_size: int | None = setting(
        None,
        "Start training on images scaled to a height of N pixels, and grow them to full size over the first 70% of the "
        "steps. Default: 0 (full size throughout).",
        low=0, metavar="N",
    )  # fmt: skip
    distill: Path | None = setting(
        None,
        "Teacher artifact for distillation; its scores serve as soft labels.",
        metavar="ARTIFACT",
        kinds=(".safetensors",),
    )
    distill_weight: float = setting(0.5, "Weight of the soft labels in the loss.", low=0, high=1)
    temperature: float = setting(4.0, "Softmax temperature of teacher and student in distillation.", low=0.01)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return DEFAULT_LR if self.lr is None else self.lr

    def chosen(self, name: str) -> Any:
        """Return a setting, by the preset if the user did not choose it."""
        value = getattr(self, name)
        return PRESETS[self.preset or "plain"][name] if value is None else value

    @property
    def unusual(self) -> str:
        """The settings that differ from the preset plain, for people to read."""
        values = {name: self.chosen(name) for name in PRESETS["plain"]}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value != PRESETS["plain"][name])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, without those that took no part; the preset's are resolved."""
        fields = {**super().to_json(), "lr": self.peak_lr, **{name: self.chosen(name) for name in PRESETS["plain"]}}
        del fields["preset"]
        if self.distill is not None:
            fields["distill"] = self.distill.name  # not its path, which says where the user keeps files
        unused = UNUSED if self.distill is not None else UNUSED | {name: fields[name] for name in DISTILLATION}
        return {name: value for name, value in fields.items() if name not in unused or value != unused[name]}


@dataclass(frozen=True)
class TrainHooks:
    """What a stage adds to plain training."""

    observe: Callable[["nn.Module"], AbstractContextManager[Any]] = nullcontext  # around the steps of each epoch
    before_step: Callable[[float], None] | None = None  # receives the share of the training that is over, 0 to 1
    penalty: Callable[[], None] | None = None  # adds to the gradients between backward and the optimizer's step
    as_evaluated: bool = False  # if the task is to stay close to a reference: without dropout, norms as they are
    keep: Literal["best", "last"] = "best"  # the result: the best epoch's weights on validation images, or the last's
    config: dict[str, Any] = field(default_factory=dict)  # the stage's settings; to resume, they must be the same
    largest_fall: float = 0.02  # of the main metric in validation, relative, without a warning; infinity: not measured
    way_out: str = "more --epochs"  # what the warning advises besides a lower learning rate


NO_HOOKS = TrainHooks()


@dataclass(frozen=True)
class RunContext:
    """Where and how a training runs; nothing here changes its result except the seed."""

    output: Path  # the artifact's; the checkpoint and the log are written beside it
    device: "torch.device"
    seed: int = 1
    resume: bool = False
    force: bool = False
    progress: Progress = Silent()  # noqa: RUF009  # it has no state
    deadline: float = math.inf  # when to stop, in seconds of time.monotonic
    checkpoint_minutes: float = 10.0  # between checkpoints within an epoch; 0: after every step
    initial_weights: str = ""  # the hash of the input network's weights; a checkpoint is not continued with others
    compiled: bool = False  # run the network through torch.compile
    trust_code: bool = False  # code recorded in the teacher's file may run
    artifacts: "Mapping[Path, Artifact]" = field(default_factory=dict)  # in memory, by the paths that stand for them
    skip_test: bool = False  # leave the test data alone at the end
    tracker: str = "auto"  # where metrics go besides the file beside the artifact; see ``training.log``


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, 0 <= step < steps."""
    return config.peak_lr * SCHEDULES[config.chosen("schedule")]((step + 0.5) / steps)


def image_size(config: TrainConfig, full: int, step: int, steps: int) -> int:
    """Return the height of a step's images in pixels, a multiple of 4 until they have their full height."""
    start, share = config.chosen("start_size"), (step + 0.5) / steps / GROWTH
    return int(start + (full - start) * share) // 4 * 4 if start and share < 1 else full


def _one_cycle(share: float) -> float:
    """Half a cosine up, then half a cosine down (Smith and Topin 2017, arXiv:1708.07120)."""
    if share < ONE_CYCLE_RISE:
        return (1 - math.cos(math.pi * share / ONE_CYCLE_RISE)) / 2
    return (1 + math.cos(math.pi * (share - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))) / 2


# A schedule: the share of the steps that is over, 0..1 -> the learning rate divided by its peak.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "one-cycle": _one_cycle,
    "linear": lambda share: min(share / LINEAR_RISE, (1 - share) / (1 - LINEAR_RISE)),
    "step": lambda share: 0.1 ** sum(share > decay for decay in STEP_DECAYS),
}
