"""micronet: make neural networks small and fast, and deploy them (written by scripts/api_stub)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from onnx import ModelProto
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact as Artifact
from micronet.core.progress import Progress
from micronet.errors import FailedError as FailedError
from micronet.errors import MicronetError as MicronetError
from micronet.evaluation.predict import Prediction
from micronet.evaluation.report import Row
from micronet.onnx.lint import Finding
from micronet.packed.program import Program
from micronet.quantization.calibrate import calibrate as calibrate
from micronet.quantization.calibrate import freeze as freeze
from micronet.quantization.calibrate import observing as observing
from micronet.quantization.sensitivity import LayerSensitivity
from micronet.runtimes.tensorrt.build import Engine
from micronet.stages.api import load as load
from micronet.stages.api import save as save


def train(
    *,
    model: str | None = None,
    data: str | Path | None = None,
    preset: Literal['plain', 'fast'] = 'plain',
    epochs: int = 8,
    lr: float | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    width: float | None = None,
    model_args: str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    amp: Literal['off', 'bf16', 'fp16'] | None = None,
    patience: int | None = None,
    weight_decay: float = 0.0,
    optimizer: Literal['adam', 'sgd', 'muon'] | None = None,
    schedule: Literal['one-cycle', 'linear', 'step'] | None = None,
    label_smoothing: float | None = None,
    ema: float | None = None,
    flip: Literal['random', 'alternating'] | None = None,
    cutout: int | None = None,
    whiten: Literal['on', 'off'] | None = None,
    start_size: int | None = None,
    distill: str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train a network from scratch.

    Args:
        model: nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (whose code then runs); default: nin.
        data: A data set's name, a folder or a file.npz.
        preset: Defaults of the options below. fast: Muon, a linear schedule, smoothed labels, alternating flips, a whitened first layer in a new network, bf16 if it is faster here, and batches for the number of images.
        epochs: Passes over the training images; 0 trains nothing.
        lr: Peak learning rate. Default: 0.01; finetune and quantize have their own.
        device: cpu, cuda, cuda:N, or a list such as 0,1 for one process per GPU (untried); default: the best one present.
        output: File to write; without it, nothing is written.
        width: Factor on the channels of every layer (built-in networks only); default: 1.
        model_args: The factory's arguments as JSON, for example '{"num_classes": 10}'.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        batch_size: Images per batch, summed over all processes. Default: 64; fast: 32 to 128.
        accumulate: Batches per optimizer step; their gradients add up.
        amp: Mixed precision: run forward and backward in 16 bits. bf16 needs a GPU or a processor that computes in it; fp16 needs a GPU and is untested. Default: off; fast: bf16 if it is faster.
        patience: Stop after N epochs without improvement in validation accuracy (ties: loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the steps of matrices and kernels, each 10 times --lr of its norm, and leaves the rest to Adam. Default: adam; fast: muon.
        schedule: Learning rate: up and then down to zero in half cosines or in lines, or divided by ten after 50, 75 and 90 % of the steps. Default: one-cycle; fast: linear.
        label_smoothing: Probability that the training target spreads evenly over all classes. Default: 0; fast: 0.1.
        ema: Average the weights over the steps: the average keeps this share of itself in each step, is validated and becomes the result. Default: 0, no average.
        flip: Mirror half of the images, drawn anew in each epoch, or each image in every second epoch. Default: random; fast: alternating.
        cutout: Grey out a square of N pixels at a random place of each training image. Default: 0.
        whiten: Begin with a first convolution that decorrelates pixels, computed from training images. Default: off; fast: on in a new network that begins with a convolution.
        start_size: Train on images of N pixels at first, which grow to the full size in the first 70 % of the steps. Default: 0, the full size.
        distill: An artifact to learn from: its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of both networks' scores in distillation.
        seed: Seed for weights, order, augmentation and the validation split.
        resume: Continue an interrupted training.
        max_time: Minutes after which training stops at a checkpoint with exit code 3; --resume continues.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untried on a GPU).
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def import_model(
    *,
    weights: str | Path | None = None,
    mean: Sequence[str | float] | str | None = None,
    std: Sequence[str | float] | str | None = None,
    model: str | None = None,
    data: str | Path | None = None,
    output: str | Path | None = None,
    seed: int = 1,
    width: float | None = None,
    model_args: str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Make an artifact of any network.

    Networks of torchvision, your own factory, or checkpoints of the original micronet (2021).

    Args:
        weights: File of weights (.safetensors, .pth, .pt). Default: initial weights drawn from --seed.
        mean: Mean of each channel of the network's input pixels, 0..1, as 0.485,0.456,0.406.
        std: Standard deviation of each channel, likewise.
        model: nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (whose code then runs); default: nin.
        data: A data set's name, a folder or a file.npz.
        output: File to write; without it, nothing is written.
        seed: Seed for the initial weights.
        width: Factor on the channels of every layer (built-in networks only); default: 1.
        model_args: The factory's arguments as JSON, for example '{"num_classes": 10}'.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def sparse_train(
    artifact: Artifact | nn.Module | str | Path | None = None,
    *,
    s: float = 0.0001,
    criterion: Literal['bn-scale', 'l1', 'l2'] = 'bn-scale',
    model: str | None = None,
    data: str | Path | None = None,
    preset: Literal['plain', 'fast'] = 'plain',
    epochs: int = 8,
    lr: float | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    trust_code: bool = False,
    width: float | None = None,
    model_args: str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    amp: Literal['off', 'bf16', 'fp16'] | None = None,
    patience: int | None = None,
    weight_decay: float = 0.0,
    optimizer: Literal['adam', 'sgd', 'muon'] | None = None,
    schedule: Literal['one-cycle', 'linear', 'step'] | None = None,
    label_smoothing: float | None = None,
    ema: float | None = None,
    flip: Literal['random', 'alternating'] | None = None,
    cutout: int | None = None,
    whiten: Literal['on', 'off'] | None = None,
    start_size: int | None = None,
    distill: str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train with a sparsity penalty before pruning.

    The weights of the last epoch are kept, not those of the best: the penalty takes time to act. Channels that cannot be cut, such as class scores, are left alone.

    Args:
        artifact: A float artifact; without one, a new network is trained.
        s: Weight of the sparsity penalty.
        criterion: What the penalty pushes towards zero: batch-norm scales, weights, or the weights of whole channels (group lasso). Attention heads are left alone.
        model: nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (whose code then runs); default: nin.
        data: A data set's name, a folder or a file.npz.
        preset: Defaults of the options below. fast: Muon, a linear schedule, smoothed labels, alternating flips, a whitened first layer in a new network, bf16 if it is faster here, and batches for the number of images.
        epochs: Passes over the training images; 0 trains nothing.
        lr: Peak learning rate. Default: 0.01; finetune and quantize have their own.
        device: cpu, cuda, cuda:N, or a list such as 0,1 for one process per GPU (untried); default: the best one present.
        output: File to write; without it, nothing is written.
        trust_code: Run the code recorded in the artifact.
        width: Factor on the channels of every layer (built-in networks only); default: 1.
        model_args: The factory's arguments as JSON, for example '{"num_classes": 10}'.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        batch_size: Images per batch, summed over all processes. Default: 64; fast: 32 to 128.
        accumulate: Batches per optimizer step; their gradients add up.
        amp: Mixed precision: run forward and backward in 16 bits. bf16 needs a GPU or a processor that computes in it; fp16 needs a GPU and is untested. Default: off; fast: bf16 if it is faster.
        patience: Stop after N epochs without improvement in validation accuracy (ties: loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the steps of matrices and kernels, each 10 times --lr of its norm, and leaves the rest to Adam. Default: adam; fast: muon.
        schedule: Learning rate: up and then down to zero in half cosines or in lines, or divided by ten after 50, 75 and 90 % of the steps. Default: one-cycle; fast: linear.
        label_smoothing: Probability that the training target spreads evenly over all classes. Default: 0; fast: 0.1.
        ema: Average the weights over the steps: the average keeps this share of itself in each step, is validated and becomes the result. Default: 0, no average.
        flip: Mirror half of the images, drawn anew in each epoch, or each image in every second epoch. Default: random; fast: alternating.
        cutout: Grey out a square of N pixels at a random place of each training image. Default: 0.
        whiten: Begin with a first convolution that decorrelates pixels, computed from training images. Default: off; fast: on in a new network that begins with a convolution.
        start_size: Train on images of N pixels at first, which grow to the full size in the first 70 % of the steps. Default: 0, the full size.
        distill: An artifact to learn from: its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of both networks' scores in distillation.
        seed: Seed for weights, order, augmentation and the validation split.
        resume: Continue an interrupted training.
        max_time: Minutes after which training stops at a checkpoint with exit code 3; --resume continues.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untried on a GPU).
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def prune(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    percent: float | None = None,
    regular: int = 1,
    criterion: Literal['bn-scale', 'l1', 'l2', 'fpgm', 'taylor', 'random'] = 'bn-scale',
    target_macs: float | None = None,
    device: str | None = None,
    data: str | Path | Tensor | Iterable[Tensor | Sequence[Tensor]] | None = None,
    output: str | Path | None = None,
    steps: int = 0,
    input_shape: str | None = None,
    scope: Literal['global', 'layer'] = 'global',
    min_channels: int = 1,
    exclude: Sequence[str | float] | str | None = None,
    widths: Sequence[str | float] | str | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    preset: Literal['plain', 'fast'] = 'plain',
    epochs: int = 4,
    lr: float | None = 0.005,
    batch_size: int | None = None,
    accumulate: int = 1,
    amp: Literal['off', 'bf16', 'fp16'] | None = None,
    patience: int | None = None,
    weight_decay: float = 0.0,
    optimizer: Literal['adam', 'sgd', 'muon'] | None = None,
    schedule: Literal['one-cycle', 'linear', 'step'] | None = None,
    label_smoothing: float | None = None,
    ema: float | None = None,
    flip: Literal['random', 'alternating'] | None = None,
    cutout: int | None = None,
    whiten: Literal['on', 'off'] | None = None,
    start_size: int | None = None,
    distill: str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Cut the channels that matter least.

    It cuts floor(percent * channels) of the prunable channels, unless --regular or grouped layers need other widths. With --steps, all steps together cut that share, to within one channel per step.

    Args:
        artifact: An artifact (.safetensors).
        example_input: An input batch, or a tuple of them; needed if no data set describes the network's input.
        percent: Share of the prunable channels to cut: at least 0, less than 1. Default: 0.5.
        regular: Make every width a multiple of this; kernels run fastest at multiples of 8 or 16.
        criterion: How channels are ranked: by batch-norm scale, size of the weights, distance to the geometric median (fpgm), or effect on the loss (taylor).
        target_macs: Cut until this share of the multiply-accumulates is left.
        device: cpu, cuda or cuda:N; default: the best one present.
        data: A data set's name, a folder or a file.npz; or input batches (N, ...), or tuples that begin with one.
        output: File to write; without it, nothing is written.
        steps: Prune in N steps, with training after each (--epochs, --lr, ...).
        input_shape: Shape of an image if no data set is known. Default: 3,224,224.
        scope: Rank all channels together, or cut the same share of every layer.
        min_channels: Smallest width of a layer; narrower layers stay as they are.
        exclude: Layers to leave alone: names and globs, separated by commas.
        widths: The widths themselves, one per prunable group, separated by commas. Replaces --percent.
        target_params: Cut until this share of the parameters is left.
        target_latency: Cut until this share of the latency is left: one image in ONNX Runtime, measured on this machine.
        preset: Defaults of the options below. fast: Muon, a linear schedule, smoothed labels, alternating flips, a whitened first layer in a new network, bf16 if it is faster here, and batches for the number of images.
        epochs: Passes over the training images; 0 trains nothing.
        lr: Peak learning rate. Default: 0.01; finetune and quantize have their own.
        batch_size: Images per batch, summed over all processes. Default: 64; fast: 32 to 128.
        accumulate: Batches per optimizer step; their gradients add up.
        amp: Mixed precision: run forward and backward in 16 bits. bf16 needs a GPU or a processor that computes in it; fp16 needs a GPU and is untested. Default: off; fast: bf16 if it is faster.
        patience: Stop after N epochs without improvement in validation accuracy (ties: loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the steps of matrices and kernels, each 10 times --lr of its norm, and leaves the rest to Adam. Default: adam; fast: muon.
        schedule: Learning rate: up and then down to zero in half cosines or in lines, or divided by ten after 50, 75 and 90 % of the steps. Default: one-cycle; fast: linear.
        label_smoothing: Probability that the training target spreads evenly over all classes. Default: 0; fast: 0.1.
        ema: Average the weights over the steps: the average keeps this share of itself in each step, is validated and becomes the result. Default: 0, no average.
        flip: Mirror half of the images, drawn anew in each epoch, or each image in every second epoch. Default: random; fast: alternating.
        cutout: Grey out a square of N pixels at a random place of each training image. Default: 0.
        whiten: Begin with a first convolution that decorrelates pixels, computed from training images. Default: off; fast: on in a new network that begins with a convolution.
        start_size: Train on images of N pixels at first, which grow to the full size in the first 70 % of the steps. Default: 0, the full size.
        distill: An artifact to learn from: its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of both networks' scores in distillation.
        seed: Seed for weights, order, augmentation and the validation split.
        resume: Continue an interrupted training.
        max_time: Minutes after which training stops at a checkpoint with exit code 3; --resume continues.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untried on a GPU).
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def finetune(
    artifact: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | None = None,
    preset: Literal['plain', 'fast'] = 'plain',
    epochs: int = 4,
    lr: float | None = 0.005,
    device: str | None = None,
    output: str | Path | None = None,
    model: str | None = None,
    trust_code: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    amp: Literal['off', 'bf16', 'fp16'] | None = None,
    patience: int | None = None,
    weight_decay: float = 0.0,
    optimizer: Literal['adam', 'sgd', 'muon'] | None = None,
    schedule: Literal['one-cycle', 'linear', 'step'] | None = None,
    label_smoothing: float | None = None,
    ema: float | None = None,
    flip: Literal['random', 'alternating'] | None = None,
    cutout: int | None = None,
    whiten: Literal['on', 'off'] | None = None,
    start_size: int | None = None,
    distill: str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train an artifact further, pruned or quantized.

    A quantized artifact continues as QAT, or as QAFT if its ranges are frozen.

    Args:
        artifact: An artifact (.safetensors).
        data: A data set's name, a folder or a file.npz.
        preset: Defaults of the options below. fast: Muon, a linear schedule, smoothed labels, alternating flips, a whitened first layer in a new network, bf16 if it is faster here, and batches for the number of images.
        epochs: Passes over the training images; 0 trains nothing.
        lr: Peak learning rate. Default: 0.01; finetune and quantize have their own.
        device: cpu, cuda, cuda:N, or a list such as 0,1 for one process per GPU (untried); default: the best one present.
        output: File to write; without it, nothing is written.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        batch_size: Images per batch, summed over all processes. Default: 64; fast: 32 to 128.
        accumulate: Batches per optimizer step; their gradients add up.
        amp: Mixed precision: run forward and backward in 16 bits. bf16 needs a GPU or a processor that computes in it; fp16 needs a GPU and is untested. Default: off; fast: bf16 if it is faster.
        patience: Stop after N epochs without improvement in validation accuracy (ties: loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the steps of matrices and kernels, each 10 times --lr of its norm, and leaves the rest to Adam. Default: adam; fast: muon.
        schedule: Learning rate: up and then down to zero in half cosines or in lines, or divided by ten after 50, 75 and 90 % of the steps. Default: one-cycle; fast: linear.
        label_smoothing: Probability that the training target spreads evenly over all classes. Default: 0; fast: 0.1.
        ema: Average the weights over the steps: the average keeps this share of itself in each step, is validated and becomes the result. Default: 0, no average.
        flip: Mirror half of the images, drawn anew in each epoch, or each image in every second epoch. Default: random; fast: alternating.
        cutout: Grey out a square of N pixels at a random place of each training image. Default: 0.
        whiten: Begin with a first convolution that decorrelates pixels, computed from training images. Default: off; fast: on in a new network that begins with a convolution.
        start_size: Train on images of N pixels at first, which grow to the full size in the first 70 % of the steps. Default: 0, the full size.
        distill: An artifact to learn from: its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of both networks' scores in distillation.
        seed: Seed for weights, order, augmentation and the validation split.
        resume: Continue an interrupted training.
        max_time: Minutes after which training stops at a checkpoint with exit code 3; --resume continues.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untried on a GPU).
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def quantize(
    artifact: Artifact | nn.Module | str | Path | None = None,
    *,
    mode: Literal['qat', 'ptq', 'qaft'] = 'qat',
    method: Literal['iao', 'dorefa', 'lsq'] = 'iao',
    w_bits: int | str = 8,
    a_bits: int | str = 8,
    q_type: Literal['sym', 'asym'] = 'sym',
    data: str | Path | Tensor | Iterable[Tensor | Sequence[Tensor]] | None = None,
    epochs: int = 2,
    output: str | Path | None = None,
    trust_code: bool = False,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] = 'minmax',
    percentile: float = 99.99,
    calib_batches: int = 4,
    calib_data: str | Path | None = None,
    calib_cache: str | Path | None = None,
    float_weights: float | None = None,
    q_level: Literal['channel', 'layer'] = 'channel',
    weight_observer: Literal['minmax', 'moving-average'] = 'minmax',
    a_sign: Literal['auto', 'signed'] = 'auto',
    first_last: Literal['auto', 'float', '8bit', '8bit-input', 'same'] = 'auto',
    a_gain: float = 0.1,
    a_ste: Literal['ste', 'saturate', 'soft'] = 'saturate',
    w_ste: Literal['ste', 'saturate', 'soft'] = 'ste',
    no_alpha: bool = False,
    bn_fuse: bool = False,
    include: Sequence[str | float] | str | None = None,
    exclude: Sequence[str | float] | str | None = None,
    keep_8bit: Sequence[str | float] | str | None = None,
    equalize: bool = False,
    weight_calibrator: Literal['minmax', 'seq-mse'] = 'minmax',
    reconstruct: Literal['layer', 'block'] | None = None,
    adaround: bool = False,
    bias_correct: bool = False,
    bn_reestimate: bool = False,
    target_drop: float | None = None,
    model: str | None = None,
    width: float | None = None,
    model_args: str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    preset: Literal['plain', 'fast'] = 'plain',
    lr: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    amp: Literal['off', 'bf16', 'fp16'] | None = None,
    patience: int | None = None,
    weight_decay: float = 0.0,
    optimizer: Literal['adam', 'sgd', 'muon'] | None = None,
    schedule: Literal['one-cycle', 'linear', 'step'] | None = None,
    label_smoothing: float | None = None,
    ema: float | None = None,
    flip: Literal['random', 'alternating'] | None = None,
    cutout: int | None = None,
    whiten: Literal['on', 'off'] | None = None,
    start_size: int | None = None,
    distill: str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    device: str | None = None,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize a network with or without training (QAT, PTQ).

    Without an artifact, the network of --model is first trained on --data with the defaults of `micronet train`. Binary and ternary networks also learn from the float artifact's scores, unless --distill names another teacher. --mode qaft takes a quantized artifact and trains it with frozen ranges, at a learning rate of 1e-5 by default.

    Args:
        artifact: A float artifact, or with --mode ptq any float .onnx file. Without one, a network is trained first.
        mode: Train with quantizers (qat), calibrate without training (ptq), or train a quantized artifact with frozen ranges (qaft).
        method: Quantization scheme for numeric bit widths.
        w_bits: Bits per weight: 2 to 16, binary, ternary, or 32 for float.
        a_bits: Bits per activation: 2 to 16, binary, or 32 for float.
        q_type: Symmetric grids (zero point 0) or asymmetric ones (iao only).
        data: A data set's name, a folder or a file.npz; or input batches (N, ...), or tuples that begin with one.
        epochs: Passes over the training images; 0 trains nothing.
        output: File to write; without it, nothing is written.
        trust_code: Run the code recorded in the artifact.
        calibrator: Activation ranges: all values, a percentile of them, least KL divergence (entropy), or least squared error.
        percentile: Percentage of the values inside the range, for --calibrator percentile.
        calib_batches: Batches of 64 images to calibrate on.
        calib_data: A folder of images to calibrate on, labelled or not, or none: make images from the statistics in batch norms (--mode ptq). Default: training images.
        calib_cache: File of activation statistics: read if it exists, otherwise written. Serves any bit width.
        float_weights: Share of QAT's steps in which weights stay float while activations are quantized already. Default: 0.
        q_level: One weight scale per output channel, or one per layer.
        weight_observer: Weight range: of the current weights, or averaged over training steps (iao only).
        a_sign: Integer type of non-negative symmetric activations: unsigned (auto), or signed for TensorRT.
        first_last: First and last layer. auto: float if weights are binary or ternary, otherwise at least 8 bits. 8bit-input: weights as in the other layers, activations with 8 bits.
        a_gain: DoReFa clips activations to 1 / gain: 1 is the paper's, 0.1 covers 0 to 10.
        a_ste: Gradient of binary activations.
        w_ste: Gradient of binary and ternary weights.
        no_alpha: Leave out the per-channel scale (alpha) of binary and ternary weights.
        bn_fuse: Fold batch norms into the convolutions before them during training.
        include: Quantize only these layers: names and globs, separated by commas.
        exclude: Leave these layers float: names and globs, separated by commas.
        keep_8bit: Layers that keep at least 8 bits: names and globs, separated by commas.
        equalize: Balance weight ranges between layers before quantizing; folds batch norms.
        weight_calibrator: Weight scales: from the largest weight, or the least error of each layer's output, layer by layer (iao).
        reconstruct: Learn the rounding of each weight so that layers keep their outputs, or blocks of layers, with learned activation scales; for 4 bits and below (iao). Use 1,000 images: --calib-batches 16.
        adaround: The same as --reconstruct layer.
        bias_correct: Restore the mean output that each layer has in the float network.
        bn_reestimate: Re-estimate batch-norm statistics on the quantized network.
        target_drop: Keep the most sensitive layers at 8 bits until the accuracy drop on validation images is at most this many percentage points.
        model: nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (whose code then runs); default: nin.
        width: Factor on the channels of every layer (built-in networks only); default: 1.
        model_args: The factory's arguments as JSON, for example '{"num_classes": 10}'.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        preset: Defaults of the options below. fast: Muon, a linear schedule, smoothed labels, alternating flips, a whitened first layer in a new network, bf16 if it is faster here, and batches for the number of images.
        lr: Peak learning rate. Default: 0.01; finetune and quantize have their own.
        batch_size: Images per batch, summed over all processes. Default: 64; fast: 32 to 128.
        accumulate: Batches per optimizer step; their gradients add up.
        amp: Mixed precision: run forward and backward in 16 bits. bf16 needs a GPU or a processor that computes in it; fp16 needs a GPU and is untested. Default: off; fast: bf16 if it is faster.
        patience: Stop after N epochs without improvement in validation accuracy (ties: loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the steps of matrices and kernels, each 10 times --lr of its norm, and leaves the rest to Adam. Default: adam; fast: muon.
        schedule: Learning rate: up and then down to zero in half cosines or in lines, or divided by ten after 50, 75 and 90 % of the steps. Default: one-cycle; fast: linear.
        label_smoothing: Probability that the training target spreads evenly over all classes. Default: 0; fast: 0.1.
        ema: Average the weights over the steps: the average keeps this share of itself in each step, is validated and becomes the result. Default: 0, no average.
        flip: Mirror half of the images, drawn anew in each epoch, or each image in every second epoch. Default: random; fast: alternating.
        cutout: Grey out a square of N pixels at a random place of each training image. Default: 0.
        whiten: Begin with a first convolution that decorrelates pixels, computed from training images. Default: off; fast: on in a new network that begins with a convolution.
        start_size: Train on images of N pixels at first, which grow to the full size in the first 70 % of the steps. Default: 0, the full size.
        distill: An artifact to learn from: its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of both networks' scores in distillation.
        seed: Seed for weights, order, augmentation and the validation split.
        device: cpu, cuda, cuda:N, or a list such as 0,1 for one process per GPU (untried); default: the best one present.
        resume: Continue an interrupted training.
        max_time: Minutes after which training stops at a checkpoint with exit code 3; --resume continues.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untried on a GPU).
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def fuse(
    artifact: Artifact | nn.Module | str | Path,
    *,
    output: str | Path | None = None,
    force: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Fold every batch norm into the layer before it.

    Quantized weights keep their integers, and biases become int32.

    Args:
        artifact: An artifact (.safetensors).
        output: File to write; without it, nothing is written.
        force: Overwrite existing files.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Artifact.

    Raises: MicronetError; it says what to change.
    """

def export_onnx(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    target: Literal['ort', 'tensorrt'] = 'ort',
    opset: int = 21,
    dynamic: Sequence[str | float] | str = 'batch',
    precision: Literal['fp32', 'fp16'] = 'fp32',
    data: str | Path | Tensor | Iterable[Tensor | Sequence[Tensor]] | None = None,
    output: str | Path | None = None,
    int4_storage: bool = False,
    embed_preprocessing: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    check_images: int = 256,
    progress: Progress | None = None,
) -> ModelProto:
    """Export to ONNX, with quantized weights as int8.

    Nothing is written if ONNX Runtime does not compute what torch computes: if it assigns more than 1 % of the images to other classes, if a layer differs by more than one step for the same input, or if a float network's scores differ by more than 0.1 % (fp16: 2 %). A warning reports scores that differ by more than 1 % although every layer agrees. See what slows the file down with micronet check-onnx.

    Args:
        artifact: An artifact (.safetensors).
        example_input: An input batch, or a tuple of them; needed if no data set describes the network's input.
        target: Target runtime: ONNX Runtime (unsigned activations) or TensorRT (signed activations, zero point 0).
        opset: ONNX operator set version, 18 to 23.
        dynamic: Dynamic axes: a comma-separated list of batch, height and width, or none.
        precision: Precision of float networks. fp16 halves the file size; inputs and outputs remain float32.
        data: A data set's name, a folder or a file.npz; or input batches (N, ...), or tuples that begin with one.
        output: File to write; without it, nothing is written.
        int4_storage: Pack weights of 4 bits or fewer two per byte: smaller files, but slower in ONNX Runtime.
        embed_preprocessing: Accept 8-bit pixels as input, with the normalization built into the file.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        force: Overwrite existing files.
        check_images: Test images on which the written network must agree with torch.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: ModelProto.

    Raises: MicronetError; it says what to change.
    """

def check_onnx(
    file: str | Path,
    *,
    target: Literal['ort', 'tensorrt', 'both'] = 'ort',
    strict: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """Report what makes an ONNX file slow or wrong.

    An error means wrong results, or a file that does not load or build; a warning means a slow or large one; a note depends on the machine.

    Args:
        file: An .onnx file, from micronet or from elsewhere.
        target: The runtime it is for.
        strict: Exit with 1 if there is an error or a warning.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: list[Finding].

    Raises: MicronetError; it says what to change.
    """

def pack(
    artifact: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    model: str | None = None,
    trust_code: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    check_images: int = 256,
    progress: Progress | None = None,
) -> Program:
    """Pack a network into 1 to 8 bits per weight.

    Batch norms are folded; with binary activations, scales, biases and batch norms become one threshold per channel. The file runs without torch (evaluate, compare and predict take it). Nothing is written if the format cannot hold the network, or if the packed network assigns test images to other classes than torch does.

    Args:
        artifact: An artifact (.safetensors).
        data: A data set's name, a folder or a file.npz.
        output: File to write; without it, nothing is written.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        force: Overwrite existing files.
        check_images: Test images on which the written network must agree with torch.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Program.

    Raises: MicronetError; it says what to change.
    """

def trt_build(
    artifact: Artifact | nn.Module | str | Path,
    *,
    precision: Literal['auto', 'fp32', 'fp16', 'int8'] = 'auto',
    min_shape: str | None = None,
    opt_shape: str | None = None,
    max_shape: str | None = None,
    backend: Literal['auto', 'tensorrt', 'tensorrt-rtx'] = 'auto',
    data: str | Path | None = None,
    output: str | Path | None = None,
    workspace: float = 1.0,
    optimization_level: int = 3,
    timing_cache: str | Path | None = None,
    compute_capability: str | None = None,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] = 'entropy',
    percentile: float = 99.99,
    calib_batches: int = 4,
    calib_data: str | Path | None = None,
    calib_cache: str | Path | None = None,
    model: str | None = None,
    trust_code: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Build a strongly typed TensorRT engine.

    TensorRT-RTX builds without a GPU (pip install tensorrt-rtx-cu13); running an engine needs one. A float network is calibrated for int8 here, on the CPU; --calib-cache also reads the caches that TensorRT up to version 10 wrote. A JSON file beside the engine holds its shapes, the data types of its layers and its origin.

    Args:
        artifact: An artifact or an .onnx file.
        precision: auto: int8 if the network is quantized, otherwise fp32. A float network is calibrated for int8.
        min_shape: Smallest input, NxCxHxW; separate several profiles by commas. Default: batch 1.
        opt_shape: The input to optimize for. Default: batch 8.
        max_shape: Largest input. Default: batch 32.
        backend: The library: TensorRT builds on the GPU that will run the engine, TensorRT-RTX anywhere.
        data: A data set's name, a folder or a file.npz.
        output: File to write; without it, nothing is written.
        workspace: GiB of GPU memory for scratch space.
        optimization_level: 0 (fast build) to 5 (exhaustive search for fast kernels).
        timing_cache: File of kernel timings, read and updated: makes later builds faster. TensorRT only.
        compute_capability: GPUs that TensorRT-RTX builds for, for example 8.6 or 8.6,8.9; default: all that it supports.
        calibrator: Activation ranges: all values, a percentile of them, least KL divergence (entropy), or least squared error.
        percentile: Percentage of the values inside the range, for --calibrator percentile.
        calib_batches: Batches of 64 images to calibrate on.
        calib_data: A folder of images to calibrate on, labelled or not, or none: make images from the statistics in batch norms (--mode ptq). Default: training images.
        calib_cache: File of activation statistics: read if it exists, otherwise written. Serves any bit width.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Engine.

    Raises: MicronetError; it says what to change.
    """

def trt_eval(
    file: str | Path,
    *,
    onnx: str | Path | None = None,
    batch_sizes: Sequence[str | float] | str = '1,8,32',
    data: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    segmentation: str | Path | None = None,
    sizes: Sequence[str | float] | str | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> dict[str, object]:
    """Evaluate a TensorRT engine on an NVIDIA GPU.

    Reports accuracy or mean IoU, and latency and throughput by batch size. Needs pycuda and the library that built the engine, in the same version. Not yet tested on a GPU.

    Args:
        file: An .engine of trt-build.
        onnx: Reference model, run by ONNX Runtime on the CPU.
        batch_sizes: Batch sizes to time; batches above the engine's maximum are split.
        data: A data set's name, a folder or a file.npz.
        device: cpu, cuda or cuda:N, for torch; default: the best available.
        threads: Number of threads; default: OMP_NUM_THREADS, or one per core.
        segmentation: Folder with images/NAME.jpg and labels/NAME.png, for a segmentation network.
        sizes: Segmentation: shorter sides, or HxW, over which scores are averaged; default: the engine's own size.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        arithmetic: ONNX Runtime's int8 kernels: exact, or fast but saturating on x86 without VNNI.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: dict[str, object].

    Raises: MicronetError; it says what to change.
    """

def evaluate(
    file: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> Row:
    """Measure the accuracy, loss and latency of a network.

    The test images are used; latency is measured for 1 and for 64 images.

    Args:
        file: An artifact, or an .onnx, .packed or .engine file.
        data: A data set's name, a folder or a file.npz.
        device: cpu, cuda or cuda:N, for torch; default: the best available.
        threads: Number of threads; default: OMP_NUM_THREADS, or one per core.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        arithmetic: ONNX Runtime's int8 kernels: exact, or fast but saturating on x86 without VNNI.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: Row.

    Raises: MicronetError; it says what to change.
    """

def compare(
    files: Sequence[Artifact | nn.Module | str | Path],
    *,
    max_drop: float | None = None,
    data: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Row]:
    """Compare networks: accuracy, MACs, size, latency.

    The first network is the reference. Sizes are file sizes, and latencies are measured on this machine, in turns. An artifact keeps float weights so that training can continue; quantization shows in the size of the exported file.

    Args:
        files: Artifacts, .onnx, .packed and .engine files.
        max_drop: Exit with 1 if a network loses more percentage points of accuracy than this against the first.
        data: A data set's name, a folder or a file.npz.
        device: cpu, cuda or cuda:N, for torch; default: the best available.
        threads: Number of threads; default: OMP_NUM_THREADS, or one per core.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        arithmetic: ONNX Runtime's int8 kernels: exact, or fast but saturating on x86 without VNNI.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: list[Row].

    Raises: MicronetError; it says what to change.
    """

def predict(
    file: Artifact | nn.Module | str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    device: str | None = None,
    threads: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Prediction]:
    """Classify images; print the most likely classes.

    Args:
        file: An artifact, or an .onnx, .packed or .engine file.
        images: Image files, or folders of them.
        top: Number of classes to list per image.
        device: cpu, cuda or cuda:N, for torch; default: the best available.
        threads: Number of threads; default: OMP_NUM_THREADS, or one per core.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        arithmetic: ONNX Runtime's int8 kernels: exact, or fast but saturating on x86 without VNNI.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: list[Prediction].

    Raises: MicronetError; it says what to change.
    """

def inspect(
    artifact: str | Path,
    *,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Show an artifact's network, history and layers.

    Args:
        artifact: An artifact (.safetensors).
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: dict[str, object].

    Raises: MicronetError; it says what to change.
    """

def sensitivity(
    artifact: Artifact | nn.Module | str | Path,
    *,
    plot: str | Path | None = None,
    method: Literal['iao', 'dorefa', 'lsq'] = 'iao',
    w_bits: int | str = 8,
    a_bits: int | str = 8,
    q_type: Literal['sym', 'asym'] = 'sym',
    mode: Literal['qat', 'ptq', 'qaft'] = 'qat',
    data: str | Path | None = None,
    q_level: Literal['channel', 'layer'] = 'channel',
    weight_observer: Literal['minmax', 'moving-average'] = 'minmax',
    a_sign: Literal['auto', 'signed'] = 'auto',
    first_last: Literal['auto', 'float', '8bit', '8bit-input', 'same'] = 'auto',
    a_gain: float = 0.1,
    a_ste: Literal['ste', 'saturate', 'soft'] = 'saturate',
    w_ste: Literal['ste', 'saturate', 'soft'] = 'ste',
    no_alpha: bool = False,
    bn_fuse: bool = False,
    include: Sequence[str | float] | str | None = None,
    exclude: Sequence[str | float] | str | None = None,
    keep_8bit: Sequence[str | float] | str | None = None,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] = 'minmax',
    percentile: float = 99.99,
    calib_batches: int = 4,
    calib_data: str | Path | None = None,
    calib_cache: str | Path | None = None,
    float_weights: float | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Measure each layer's sensitivity to few bits.

    Each layer is quantized alone. Reports the signal-to-noise ratio of the scores and the accuracy lost on the validation images; the most sensitive layer comes first.

    Args:
        artifact: An artifact (.safetensors).
        plot: Draw the layers into this .png or .svg (needs matplotlib).
        method: Quantization scheme for numeric bit widths.
        w_bits: Bits per weight: 2 to 16, binary, ternary, or 32 for float.
        a_bits: Bits per activation: 2 to 16, binary, or 32 for float.
        q_type: Symmetric grids (zero point 0) or asymmetric ones (iao only).
        mode: Train with quantizers (qat), calibrate without training (ptq), or train a quantized artifact with frozen ranges (qaft).
        data: A data set's name, a folder or a file.npz.
        q_level: One weight scale per output channel, or one per layer.
        weight_observer: Weight range: of the current weights, or averaged over training steps (iao only).
        a_sign: Integer type of non-negative symmetric activations: unsigned (auto), or signed for TensorRT.
        first_last: First and last layer. auto: float if weights are binary or ternary, otherwise at least 8 bits. 8bit-input: weights as in the other layers, activations with 8 bits.
        a_gain: DoReFa clips activations to 1 / gain: 1 is the paper's, 0.1 covers 0 to 10.
        a_ste: Gradient of binary activations.
        w_ste: Gradient of binary and ternary weights.
        no_alpha: Leave out the per-channel scale (alpha) of binary and ternary weights.
        bn_fuse: Fold batch norms into the convolutions before them during training.
        include: Quantize only these layers: names and globs, separated by commas.
        exclude: Leave these layers float: names and globs, separated by commas.
        keep_8bit: Layers that keep at least 8 bits: names and globs, separated by commas.
        calibrator: Activation ranges: all values, a percentile of them, least KL divergence (entropy), or least squared error.
        percentile: Percentage of the values inside the range, for --calibrator percentile.
        calib_batches: Batches of 64 images to calibrate on.
        calib_data: A folder of images to calibrate on, labelled or not, or none: make images from the statistics in batch norms (--mode ptq). Default: training images.
        calib_cache: File of activation statistics: read if it exists, otherwise written. Serves any bit width.
        float_weights: Share of QAT's steps in which weights stay float while activations are quantized already. Default: 0.
        image_size: Resize and crop images to squares with sides of this many pixels.
        limit: Use at most N training and N test images.
        model: path/to/file.py:factory, repeated to allow an artifact to run the code it was made from.
        trust_code: Run the code recorded in the artifact.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: list[LayerSensitivity].

    Raises: MicronetError; it says what to change.
    """

def run_recipe(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    device: str | None = None,
    from_stage: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Row]:
    """Run a recipe, skipping stages that are unchanged.

    A stage that was interrupted continues. Images in a folder are not checked for changes: use --force. A recipe ends with a comparison of all files that it made.

    Args:
        recipe: A TOML file, or the name of a bundled recipe, for example digits.
        output: File to write; without it, nothing is written.
        data: A data set's name, a folder or a file.npz.
        device: cpu, cuda or cuda:N, for every stage.
        from_stage: Run this stage and all later ones, even if they are unchanged.
        force: Run every stage, even if it is unchanged.
        progress: An object with ``step`` and ``line`` that receives progress.

    Returns: list[Row].

    Raises: MicronetError; it says what to change.
    """
