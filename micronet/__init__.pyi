"""micronet: make neural networks small and fast, and deploy them (written by scripts/api_stub)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from onnx import ModelProto
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact as Artifact
from micronet.core.folders import Folder
from micronet.core.progress import Progress
from micronet.errors import FailedError as FailedError
from micronet.errors import MicronetError as MicronetError
from micronet.errors import StoppedError as StoppedError
from micronet.evaluation.predict import Prediction
from micronet.evaluation.report import Row
from micronet.models.inputs import Batch
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
    model: str | Artifact | nn.Module | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    preset: Literal['plain', 'fast'] | None = None,
    epochs: int = 8,
    lr: float | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    trust_code: bool = False,
    width: float | None = None,
    model_args: Mapping[str, object] | str | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
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
    distill: Artifact | nn.Module | str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    log: Literal['auto', 'tensorboard', 'mlflow', 'none'] = 'auto',
    skip_test: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train a network from scratch.

    Args:
        model: A network in memory, nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or
            path/to/file.py:factory (which runs that code); default: nin.
        data: Name of a data set, a folder or an .npz file; or batches in memory, such as a DataLoader, a list of
            (inputs, labels) or one such tuple. Inputs are a tensor of shape (N, ...), several of them, or a dict
            keyed by the names of forward's arguments; they are used as they are.
        preset: Defaults for the keywords below. fast: Muon, linear schedule, label smoothing, alternating flips,
            whitened first layer in new networks, bf16 where it is known to be faster, and a batch size that
            depends on the number of images. plain: Adam, one-cycle schedule, none of these. Default: fast
            (sparse-train: plain).
        epochs: Number of epochs; 0 skips training.
        lr: Peak learning rate. Default: 0.01 (with Muon 0.01 * sqrt(2000 / steps) beyond 2,000 steps; lower in
            finetune, quantize, and sparse-train of an artifact).
        device: cpu, cuda, cuda:N, or GPU numbers such as 0,1 to run one process per GPU (untested); default: cuda
            if available, otherwise cpu.
        output: File to write; by default, nothing is written.
        trust_code: Allow code stored in the teacher's file (distill) to run.
        width: Multiplier for the width of every layer (built-in networks only); default: 1.
        model_args: Model arguments as JSON, for example '{"num_classes": 10}'.
        task: classification, segmentation, agreement (with the float network; for any network and inputs, without
            labels) or path/to/file.py:Task (which runs that code). Default: the task recorded in the artifact;
            without one, classification.
        image_size: Resize and crop images to N (NxN) or HEIGHTxWIDTH pixels.
        limit: Use at most N training and N test images.
        batch_size: Images per batch, across all processes. Default: 32 to 128, by the number of images; plain:
            64.
        accumulate: Number of batches to accumulate gradients over before each optimizer step.
        amp: Mixed-precision training. bf16 needs a GPU or a CPU with bf16 instructions; fp16 needs a GPU and is
            untested. Default: bf16 on GPUs that support it, and on such CPUs for networks of convolutions; plain:
            off.
        patience: Stop after N epochs without improvement in validation accuracy (ties are broken by the loss).
        weight_decay: L2 penalty on the weights.
        optimizer: Adam; SGD with Nesterov momentum 0.9; or Muon, which orthogonalizes the updates of matrices and
            kernels, scaled to 10 * lr times their norm, and uses Adam for all other parameters. Default: muon;
            plain: adam.
        schedule: Learning-rate schedule: warmup and decay to zero, with cosine (one-cycle) or linear ramps; or
            division by 10 after 50%, 75% and 90% of the steps. Default: linear; plain: one-cycle.
        label_smoothing: Label smoothing: share of the target probability spread over all classes. Default: 0.1;
            plain: 0.
        ema: Decay of the exponential moving average of the weights, which is then validated and saved instead of
            the weights. Default: 0 (off).
        flip: Horizontal flips: of a random half of the images in each epoch, or of every image in every other
            epoch. Default: alternating; plain: random.
        cutout: Gray out a random NxN square in each training image. Default: 0 (off).
        whiten: Initialize the first convolution to whiten (decorrelate) the pixels of the training images.
            Default: on in new networks that start with a convolution; plain: off.
        start_size: Start training on images scaled to a height of N pixels, and grow them to full size over the
            first 70% of the steps. Default: 0 (full size throughout).
        distill: Teacher artifact for distillation; its scores serve as soft labels.
        distill_weight: Weight of the soft labels in the loss.
        temperature: Softmax temperature of teacher and student in distillation.
        seed: Seed for initial weights, shuffling, augmentation and the validation split.
        resume: Resume an interrupted training run.
        max_time: Minutes after which training saves a checkpoint and raises StoppedError; continue with
            resume=True.
        checkpoint_minutes: Minutes between checkpoints within an epoch (0: every step).
        compile: Compile the training step with torch.compile (untested on a GPU).
        log: Where metrics go besides the .metrics.jsonl file: TensorBoard, MLflow, or none. auto: TensorBoard if
            it is installed.
        skip_test: Do not measure the network on the test data at the end.
        force: Overwrite existing files.
        progress: An object with ``step`` and ``line`` methods that receives progress updates.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def import_model(
    *,
    weights: str | Path | None = None,
    mean: Sequence[str | float] | str | None = None,
    std: Sequence[str | float] | str | None = None,
    model: str | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    seed: int = 1,
    width: float | None = None,
    model_args: Mapping[str, object] | str | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Create an artifact from any network.

    Imports torchvision networks, networks built by your own factory function, and checkpoints from the original
    micronet (2021).

    Args:
        weights: Weights file (.safetensors, .pth, .pt). Default: random initial weights from seed.
        mean: Per-channel mean for input normalization (pixels are scaled to 0..1), for example 0.485,0.456,0.406.
        std: Per-channel standard deviation for input normalization, for example 0.229,0.224,0.225.
        seed: Seed for the initial weights.
        data, output, width, model_args, task, image_size, limit, force, progress: As in ``train``.
        model: As in ``quantize``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def sparse_train(
    artifact: Artifact | nn.Module | str | Path | None = None,
    *,
    s: float = 0.0001,
    criterion: Literal['bn-scale', 'l1', 'l2'] = 'bn-scale',
    model: str | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    preset: Literal['plain', 'fast'] | None = 'plain',
    epochs: int = 8,
    lr: float | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    trust_code: bool = False,
    width: float | None = None,
    model_args: Mapping[str, object] | str | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
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
    distill: Artifact | nn.Module | str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    log: Literal['auto', 'tensorboard', 'mlflow', 'none'] = 'auto',
    skip_test: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train with a sparsity penalty before pruning.

    The weights of the last epoch are saved instead of the best ones, because the penalty takes time to act.
    Channels that cannot be pruned, such as class scores, are not penalized. An artifact is trained at a peak
    learning rate of 0.005, a new network at 0.01, unless lr is given.

    Args:
        artifact: A float artifact; without one, a new network is trained.
        s: Weight of the sparsity penalty.
        criterion: What the penalty pushes toward zero: batch-norm scales, individual weights (l1), or the weights
            of whole channels (l2, group lasso). Attention heads are not penalized.
        data, preset, epochs, lr, device, output, width, model_args, task, image_size, limit, batch_size,
            accumulate, amp, patience, weight_decay, optimizer, schedule, label_smoothing, ema, flip, cutout,
            whiten, start_size, distill, distill_weight, temperature, seed, resume, max_time, checkpoint_minutes,
            compile, log, skip_test, force, progress: As in ``train``.
        trust_code: As in ``evaluate``.
        model: As in ``quantize``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def prune(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    *,
    percent: float | None = None,
    regular: int = 1,
    criterion: Literal['auto', 'bn-scale', 'l1', 'l2', 'fpgm', 'taylor', 'random'] = 'auto',
    target_macs: float | None = None,
    device: str | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    steps: int = 0,
    input_shape: str | None = None,
    skip_timing: bool = False,
    scope: Literal['global', 'layer'] = 'global',
    min_channels: int = 1,
    exclude: Sequence[str | float] | str | None = None,
    widths: Sequence[str | float] | str | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    preset: Literal['plain', 'fast'] | None = None,
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
    distill: Artifact | nn.Module | str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    log: Literal['auto', 'tensorboard', 'mlflow', 'none'] = 'auto',
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Remove the least important channels.

    Removes floor(percent * channels) of the prunable channels, unless regular or grouped layers require other
    widths. With steps, all steps together remove that fraction, to within one channel per step.

    Args:
        artifact: An artifact (.safetensors).
        example_input: Example input: a tensor or tuple of tensors; required if no data set determines it.
        percent: Fraction of the prunable channels to remove: at least 0, less than 1. Default: 0.5.
        regular: Make every width a multiple of this number; kernels are fastest at multiples of 8 or 16.
        criterion: How to rank channels: by batch-norm scale, weight norm (l1, l2), distance to the geometric
            median (fpgm), effect on the loss (taylor), or at random. auto: that of sparse-train, or bn-scale if
            every channel has a batch norm, otherwise l2.
        target_macs: Prune until this fraction of the multiply-accumulates (MACs) is left.
        device: cpu, cuda or cuda:N; default: cuda if available, otherwise cpu.
        steps: Prune in N steps and train after each one (epochs, lr, ...).
        input_shape: Input shape if no data set is known. Default: 3,224,224.
        scope: Rank all channels together, or prune every layer by the same fraction.
        min_channels: Minimum width of a layer; narrower layers are not pruned.
        exclude: Layers not to prune: comma-separated names or globs.
        widths: Exact widths, one per prunable group, separated by commas. Replaces percent.
        target_params: Prune until this fraction of the parameters is left.
        target_latency: Prune until the latency is this fraction of the original (for one image in ONNX Runtime on
            this machine).
        data, output, preset, epochs, lr, batch_size, accumulate, amp, patience, weight_decay, optimizer,
            schedule, label_smoothing, ema, flip, cutout, whiten, start_size, distill, distill_weight,
            temperature, seed, resume, max_time, checkpoint_minutes, compile, log, task, image_size, limit, force,
            progress: As in ``train``.
        skip_timing, model, trust_code: As in ``evaluate``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def finetune(
    artifact: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    preset: Literal['plain', 'fast'] | None = None,
    epochs: int = 4,
    lr: float | None = 0.005,
    device: str | None = None,
    output: str | Path | None = None,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
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
    distill: Artifact | nn.Module | str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    log: Literal['auto', 'tensorboard', 'mlflow', 'none'] = 'auto',
    skip_test: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Continue training an artifact.

    Quantized artifacts continue with QAT, or with QAFT if their ranges are frozen.

    Args:
        artifact: An artifact (.safetensors).
        data, preset, epochs, lr, device, output, task, image_size, limit, batch_size, accumulate, amp, patience,
            weight_decay, optimizer, schedule, label_smoothing, ema, flip, cutout, whiten, start_size, distill,
            distill_weight, temperature, seed, resume, max_time, checkpoint_minutes, compile, log, skip_test,
            force, progress: As in ``train``.
        model, trust_code: As in ``evaluate``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def quantize(
    artifact: Artifact | nn.Module | str | Path | None = None,
    *,
    mode: Literal['qat', 'ptq', 'qaft'] = 'qat',
    method: Literal['iao', 'dorefa', 'lsq'] = 'iao',
    w_bits: int | str = 8,
    a_bits: int | str = 8,
    q_type: Literal['auto', 'sym', 'asym'] = 'auto',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    epochs: int = 2,
    output: str | Path | None = None,
    trust_code: bool = False,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] | None = None,
    percentile: float = 99.99,
    calib_batches: int | None = None,
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
    w_center: bool = False,
    no_alpha: bool = False,
    bn_fuse: bool = False,
    include: Sequence[str | float] | str | None = None,
    exclude: Sequence[str | float] | str | None = None,
    keep_8bit: Sequence[str | float] | str | None = None,
    float_outputs: bool = False,
    equalize: bool = False,
    weight_calibrator: Literal['minmax', 'seq-mse'] = 'minmax',
    reconstruct: Literal['layer', 'block'] | None = None,
    adaround: bool = False,
    bias_correct: bool = False,
    bn_reestimate: bool = False,
    target_drop: float | None = None,
    mean: Sequence[str | float] | str | None = None,
    std: Sequence[str | float] | str | None = None,
    input_shape: str | None = None,
    layout: Literal['auto', 'nchw', 'nhwc'] = 'auto',
    skip_timing: bool = False,
    model: str | None = None,
    width: float | None = None,
    model_args: Mapping[str, object] | str | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    preset: Literal['plain', 'fast'] | None = None,
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
    distill: Artifact | nn.Module | str | Path | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    seed: int = 1,
    device: str | None = None,
    resume: bool = False,
    max_time: float | None = None,
    checkpoint_minutes: float = 10.0,
    compile: bool = False,
    log: Literal['auto', 'tensorboard', 'mlflow', 'none'] = 'auto',
    skip_test: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Quantize a network with or without training (QAT, PTQ).

    Without an artifact, the network given by model is first trained on data with the defaults of ``train``.
    Networks quantized to 4 bits or fewer are also distilled from the float artifact, unless distill specifies
    another teacher. mode="qaft" trains a quantized artifact with frozen ranges, by default at a learning rate of
    1e-5.

    Args:
        artifact: A float artifact or, with mode="ptq", any float .onnx file. Without one, a network is trained
            first.
        mode: Train with quantizers (qat), calibrate without training (ptq), or train a quantized artifact with
            frozen ranges (qaft).
        method: Quantization scheme for numeric bit widths.
        w_bits: Bits per weight: 2 to 16, binary, ternary, or 32 for float.
        a_bits: Bits per activation: 2 to 16, binary, or 32 for float.
        q_type: Symmetric quantization (zero point 0) or asymmetric (iao only). auto: symmetric, but asymmetric
            for 8-bit activations that may be negative, unless a_sign is signed. Activations of ONNX files are
            asymmetric, unless a_sign is signed.
        calibrator: How to choose activation ranges: minimum and maximum, a percentile, least KL divergence
            (entropy), or least squared error (mse). Default: minmax for artifacts, the closer of mse and minmax
            for ONNX files, and entropy for TensorRT.
        percentile: Percentage of values inside the range, for calibrator="percentile".
        calib_batches: Number of calibration batches of 64 images. Default: 4, but all batches that Python gives
            to mode="ptq" of a network other than an ONNX file.
        calib_data: Folder of calibration images, labeled or not; or none to generate images from the batch-norm
            statistics of an artifact (not for QAT); or, for ONNX files, an .npz file with one array for each
            input. Default: training images.
        calib_cache: Cache file for activation statistics: read if it exists, otherwise written. Valid for any bit
            width.
        float_weights: Initial fraction of QAT steps in which activations are quantized but weights stay in float.
            Default: 0.5 for binary weights and activations, otherwise 0.
        q_level: One weight scale per output channel, or one per layer.
        weight_observer: Weight ranges: minimum and maximum of the current weights, or a moving average over
            training steps (iao only).
        a_sign: Integer type of nonnegative activations with q_type="sym": unsigned (auto), or signed for
            TensorRT.
        first_last: Precision of the first and last layers. auto: float if weights are binary or ternary,
            otherwise at least 8 bits, except that mode="ptq" leaves last layers in float of which 8 bits would
            leave nothing. 8bit-input: weights as in the other layers, activations at 8 bits.
        a_gain: Gain of DoReFa activations, which are clipped to 0..1/gain: 1 as in the paper, or 0.1 for the
            range 0..10.
        a_ste: Gradient estimator for binary activations.
        w_ste: Gradient estimator for binary and ternary weights.
        w_center: Subtract the mean over the inputs from binary weights before taking their signs.
        no_alpha: Disable the per-channel scale (alpha) of binary and ternary weights.
        bn_fuse: Fold batch norms into the preceding convolutions during training.
        include: Quantize only these layers: comma-separated names or globs.
        exclude: Keep these layers in float: comma-separated names or globs.
        keep_8bit: Keep these layers at 8 bits or more: comma-separated names or globs.
        float_outputs: Do not quantize what a convolution gives if only the network's outputs depend on it.
            OpenVINO is faster so; ONNX Runtime then computes that convolution in float.
        equalize: Balance weight ranges between layers before quantization (cross-layer equalization); folds batch
            norms.
        weight_calibrator: How to choose weight scales: from the largest weight, or to minimize the output error
            of each layer in turn (iao).
        reconstruct: Learn weight rounding to preserve the outputs of each layer, or of each block of layers
            (which also learns activation scales); for 4 bits or fewer (iao). Use about 1,000 images:
            calib_batches=16.
        adaround: Same as reconstruct="layer".
        bias_correct: Correct biases so that the mean output of every layer matches that of the float network.
        bn_reestimate: Re-estimate batch-norm statistics in the quantized network.
        target_drop: Keep the most sensitive layers at 8 bits, as many as needed to limit the drop in validation
            accuracy to this many percentage points.
        mean: Per-channel mean of an ONNX file's images (pixels are scaled to 0..1), for example
            0.485,0.456,0.406.
        std: Per-channel standard deviation of an ONNX file's images; use with mean.
        input_shape: Shape of an ONNX file's images if its sizes are dynamic, for example 3,48,320.
        layout: Axis order of an ONNX file's images. auto: inferred from its fixed sizes.
        model: nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (which runs
            that code); default: nin.
        data, epochs, output, width, model_args, task, image_size, limit, preset, lr, batch_size, accumulate, amp,
            patience, weight_decay, optimizer, schedule, label_smoothing, ema, flip, cutout, whiten, start_size,
            distill, distill_weight, temperature, seed, device, resume, max_time, checkpoint_minutes, compile,
            log, skip_test, force, progress: As in ``train``.
        trust_code, skip_timing: As in ``evaluate``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def fuse(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Fold every batch norm into the layer before it.

    Integer weights are unchanged, and biases are rounded to int32.

    Args:
        artifact: An artifact (.safetensors).
        example_input: Example input: a tensor or tuple of tensors; required if no data set determines it.
        output, force, progress: As in ``train``.
        model, trust_code: As in ``evaluate``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def export_onnx(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    *,
    target: Literal['ort', 'tensorrt'] = 'ort',
    opset: int = 21,
    dynamic: Sequence[str | float] | str = 'batch',
    precision: Literal['fp32', 'fp16'] = 'fp32',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    skip_timing: bool = False,
    low_bit_storage: bool = False,
    int4_storage: bool = False,
    embed_preprocessing: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    check_images: int = 256,
    progress: Progress | None = None,
) -> ModelProto:
    """Export a network to ONNX, with quantized weights as int8.

    The file is run in ONNX Runtime and only written if it agrees with torch. The check fails if more than 1% of
    the predicted classes change (near ties not counted), if a quantized layer is off by more than one
    quantization step for the same input, or if the outputs of a float network differ by more than 0.1% (fp16:
    2%). If every quantized layer agrees but the outputs differ by more than 1%, a warning is printed. To find out
    what makes the file slow, run ``check_onnx``.

    Args:
        artifact: An artifact (.safetensors).
        example_input: Example input: a tensor or tuple of tensors; required if no data set determines it.
        target: Target runtime: ONNX Runtime (unsigned activations) or TensorRT (signed activations, zero point
            0).
        opset: ONNX operator set version, 18 to 23.
        dynamic: Dynamic axes: a comma-separated list of batch, height and width, or none. A number is an axis of
            every input that has it: 1 for the length of (batch, length).
        precision: Precision of float networks. fp16 halves the file size; inputs and outputs remain float32.
        low_bit_storage: Store weights of fewer than 8 bits in about as many, unpacked when the file is loaded.
            The outputs and the speed stay the same.
        int4_storage: Store weights of 4 bits or fewer as ONNX's INT4, which is slower in ONNX Runtime;
            low_bit_storage is not.
        embed_preprocessing: Accept 8-bit pixels as input, with the normalization built into the file.
        check_images: Number of test images used to check that the exported network agrees with torch.
        data, output, task, image_size, limit, force, progress: As in ``train``.
        skip_timing, model, trust_code: As in ``evaluate``.

    Returns:
        ModelProto: The ONNX model.

    Raises:
        MicronetError: See the module's documentation.
    """

def export(
    artifact: Artifact | nn.Module | str | Path,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    *,
    target: str = 'onnxruntime',
    precision: Literal['fp32', 'fp16'] = 'fp32',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    skip_timing: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    check_images: int = 256,
    progress: Progress | None = None,
) -> ModelProto | Program | Engine | Folder:
    """Export a network to any runtime.

    target onnxruntime, packed and tensorrt do what export-onnx, pack and trt-build do with their defaults. The
    other targets write a folder of files; evaluate, compare and predict take such a folder in place of a file.
    Nothing is written if the target lacks an operator, or if its outputs do not agree with torch's. Afterwards,
    the latency is compared with that of the float network in the same runtime.

    Args:
        artifact: An artifact (.safetensors).
        example_input: Example input: a tensor or tuple of tensors; required if no data set determines it.
        target: Target runtime: onnxruntime, openvino, ncnn, c, tensorrt, packed.
        precision: How float weights are stored. fp16 halves them; onnxruntime computes in fp16 too, openvino and
            ncnn in fp32.
        check_images: Number of test images used to check that the exported network agrees with torch.
        data, output, task, image_size, limit, force, progress: As in ``train``.
        skip_timing, model, trust_code: As in ``evaluate``.

    Returns:
        ModelProto | Program | Engine | Folder: What the function for the target returns, or the files by name.

    Raises:
        MicronetError: See the module's documentation.
    """

def check_onnx(
    file: str | Path,
    *,
    target: Literal['ort', 'tensorrt', 'both'] = 'ort',
    strict: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """Find out what makes an ONNX model slow or inaccurate.

    Errors mean wrong results, or a file that does not load or build. Warnings mean a slow or large file. Whether
    a note matters depends on the machine.

    Args:
        file: An .onnx file, from micronet or any other tool.
        target: Target runtime.
        strict: Raise FailedError if there are errors or warnings.
        progress: As in ``train``.

    Returns:
        list[Finding]: The severity, rule, node, problem and fix of each finding.

    Raises:
        MicronetError: See the module's documentation.
    """

def pack(
    artifact: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    skip_timing: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    check_images: int = 256,
    progress: Progress | None = None,
) -> Program:
    """Pack a network into a file with 1 to 8 bits per weight.

    Batch norms are folded; with binary activations, scales, biases and batch norms become one threshold per
    channel. The file runs without torch, in evaluate, compare and predict. Nothing is written if the format does
    not support the network (all unsupported operators are listed with their layers before anything runs), or if
    the packed network and torch predict different classes for more than 1% of the test images, near ties not
    counted. Afterwards, the latency of the packed network is compared with ONNX Runtime's.

    Args:
        artifact: An artifact (.safetensors).
        check_images: Number of test images used to check that the exported network agrees with torch.
        data, output, task, image_size, limit, force, progress: As in ``train``.
        skip_timing, model, trust_code: As in ``evaluate``.

    Returns:
        Program: The packed network.

    Raises:
        MicronetError: See the module's documentation.
    """

def trt_build(
    artifact: Artifact | nn.Module | str | Path,
    *,
    precision: Literal['auto', 'fp32', 'fp16', 'int8'] = 'auto',
    min_shape: str | None = None,
    opt_shape: str | None = None,
    max_shape: str | None = None,
    backend: Literal['auto', 'tensorrt', 'tensorrt-rtx'] = 'auto',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    output: str | Path | None = None,
    workspace: float = 1.0,
    optimization_level: int = 3,
    timing_cache: str | Path | None = None,
    compute_capability: str | None = None,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] | None = 'entropy',
    percentile: float = 99.99,
    calib_batches: int | None = None,
    calib_data: str | Path | None = None,
    calib_cache: str | Path | None = None,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Build a strongly typed TensorRT engine.

    TensorRT-RTX can build without a GPU (pip install tensorrt-rtx-cu13); running an engine requires one. Float
    networks are calibrated for int8 on the CPU; calib_cache also reads calibration caches from TensorRT 10 and
    earlier. A JSON file next to the engine records its shapes, the data types of its layers and its source.

    Args:
        artifact: An artifact or an .onnx file.
        precision: Precision of the engine. auto: int8 if the network is quantized, otherwise fp32. For int8,
            float networks are calibrated first.
        min_shape: Minimum input shape, NxCxHxW; separate multiple profiles with commas. Default: batch 1.
        opt_shape: Input shape to optimize for. Default: batch 8.
        max_shape: Maximum input shape. Default: batch 32.
        backend: Library to use: TensorRT must build on the GPU that will run the engine; TensorRT-RTX can build
            on any machine.
        workspace: Maximum GPU memory for scratch space, in GiB.
        optimization_level: Optimization level, from 0 (fast build) to 5 (exhaustive search for fast kernels).
        timing_cache: File of kernel timings that makes later builds faster; read if it exists, then updated.
            TensorRT only.
        compute_capability: Compute capabilities that TensorRT-RTX builds for, for example 8.6 or 8.6,8.9;
            default: all supported ones.
        calib_data: Folder of calibration images, labeled or not; for ONNX files, also an .npz file with one array
            for each input. Default: training images.
        data, output, task, image_size, limit, force, progress: As in ``train``.
        model, trust_code: As in ``evaluate``.
        calibrator, percentile, calib_batches, calib_cache: As in ``quantize``.

    Returns:
        Engine: The engine's bytes (``data``) and its description (``about``).

    Raises:
        MicronetError: See the module's documentation.
    """

def trt_eval(
    file: str | Path,
    *,
    onnx: str | Path | None = None,
    batch_sizes: Sequence[str | float] | str = '1,8,32',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    segmentation: str | Path | None = None,
    sizes: Sequence[str | float] | str | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> dict[str, object]:
    """Evaluate a TensorRT engine on an NVIDIA GPU.

    Reports accuracy or mean IoU, and latency and throughput by batch size. Requires pycuda and the same version
    of the library that built the engine. Not yet tested on a GPU.

    Args:
        file: An .engine file from trt-build.
        onnx: Reference model, run by ONNX Runtime on the CPU.
        batch_sizes: Batch sizes to time; batches above the engine's maximum are split.
        segmentation: For segmentation networks at several sizes: a folder with images/NAME.jpg and masks/NAME.png
            (or labels/).
        sizes: For segmentation networks: average the scores over these sizes, each given as a shorter side or as
            HxW; default: the engine's size.
        data, task, image_size, limit, progress: As in ``train``.
        runtime, device, threads, model, trust_code, arithmetic: As in ``evaluate``.

    Returns:
        dict[str, object]: The figures by name.

    Raises:
        MicronetError: See the module's documentation.
    """

def evaluate(
    file: Artifact | nn.Module | str | Path,
    *,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    skip_timing: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> Row:
    """Measure the accuracy, loss and latency of a network.

    Evaluates on the test images; latency is measured for batches of 1 and 64 images.

    Args:
        file: An artifact, an .onnx, .packed or .engine file, or a folder from export.
        runtime: Runtime for .onnx files: onnxruntime, or openvino if that package is installed; compare takes
            both, separated by a comma. Default: onnxruntime.
        device: Device for torch: cpu, cuda or cuda:N; default: cuda if available, otherwise cpu.
        threads: Number of CPU threads; default: OMP_NUM_THREADS, or one per core.
        skip_timing: Do not measure how fast the networks run.
        model: path/to/file.py:factory, your copy of the code that built the network; passing it allows that code
            to run.
        trust_code: Allow code stored in the artifact to run.
        arithmetic: ONNX Runtime's int8 arithmetic: exact, or fast but with sums that can saturate on x86 CPUs
            without VNNI.
        data, task, image_size, limit, progress: As in ``train``.

    Returns:
        Row: Accuracy, loss, agreement, latencies in ms, size in bytes, parameters and MACs.

    Raises:
        MicronetError: See the module's documentation.
    """

def compare(
    files: Sequence[Artifact | nn.Module | str | Path],
    *,
    html: str | Path | None = None,
    max_drop: float | None = None,
    max_size: float | None = None,
    min_speedup: float | None = None,
    max_latency: float | None = None,
    min_agreement: float | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    runtime: str | None = None,
    skip_timing: bool = False,
    csv: str | Path | None = None,
    junit: str | Path | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    device: str | None = None,
    threads: int | None = None,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Row]:
    """Compare the accuracy, MACs, size and latency of networks.

    The first network is the reference. Latencies are measured on this machine, alternating between the networks.
    Sizes are file sizes; artifacts store float weights for further training, so quantization only reduces the
    size of exported files. The gates, max_drop and others, judge every network but the first.

    Args:
        files: Artifacts, .onnx, .packed and .engine files, and folders from export.
        html: Also write a page that says which network to ship, with charts, layers and the images they disagree
            on.
        max_drop: Raise FailedError if the accuracy of any network is more than this many percentage points below
            that of the first; of other tasks, if the main metric is worse by more than this many hundredths.
        max_size: Raise FailedError if a file is larger: in bytes or, up to 1, as a fraction of the first file's
            size.
        min_speedup: Raise FailedError if a network takes more than 1/N of the first one's time for one sample
            (medians); 2 is twice as fast.
        max_latency: Raise FailedError if the median time for one sample is longer, in milliseconds.
        min_agreement: Raise FailedError if a network chooses the first one's class for less than this percentage
            of the images.
        csv: Also write the rows to this file, as CSV.
        junit: Also write what the gates say to this file, as JUnit XML: a test case for each network and gate.
        data, task, image_size, limit, progress: As in ``train``.
        runtime, skip_timing, model, trust_code, device, threads, arithmetic: As in ``evaluate``.

    Returns:
        list[Row]: One row per network, as ``evaluate`` returns it; drop and agreement are relative to the first.

    Raises:
        MicronetError: See the module's documentation.
    """

def report(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    max_drop: float | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    skip_timing: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Row]:
    """Write a page that compares the networks in a folder.

    Compares all networks in the folder as micronet compare does, and writes a page that says which one to ship.
    The reference is the first one that the recipe made or, of other files, the artifact with the shortest
    history. Networks that cannot be measured are named on the page, and make the command fail.

    Args:
        folder: The folder of a recipe, or any folder of networks.
        max_drop: Loss of accuracy, in percentage points, up to which a network may be recommended. Default: 1.
        output, data, task, image_size, limit, progress: As in ``train``.
        runtime, device, threads, skip_timing, model, trust_code, arithmetic: As in ``evaluate``.

    Returns:
        list[Row]: One row per network, as ``evaluate`` returns it; drop and agreement are relative to the first.

    Raises:
        MicronetError: See the module's documentation.
    """

def plot(
    files: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    what: Literal['curves', 'weights', 'activations', 'pareto'] = 'curves',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    skip_timing: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Path]:
    """Draw training curves, or histograms of weights and activations.

    Curves come from the .metrics.jsonl files that trainings write beside their artifacts, even while they run.
    Histograms of quantized layers are in steps of their grid; its levels, or its ends if there are many, are
    lines. The networks of a Pareto chart are measured on the test images, as micronet compare does.

    Args:
        files: Artifacts, or folders of them; for pareto, any networks. For histograms, a single artifact.
        what: Loss and metrics by epoch, histograms of a network's weights or activations, or the main metric over
            latency and size.
        output, data, task, image_size, limit, progress: As in ``train``.
        skip_timing, model, trust_code, runtime, device, threads, arithmetic: As in ``evaluate``.

    Returns:
        list[Path]: The file that was written.

    Raises:
        MicronetError: See the module's documentation.
    """

def predict(
    file: Artifact | nn.Module | str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    arithmetic: Literal['exact', 'fast'] = 'exact',
    progress: Progress | None = None,
) -> list[Prediction]:
    """Find the most likely classes of images.

    Args:
        images: Image files, or folders of images.
        top: Number of classes to list per image.
        progress: As in ``train``.
        file, runtime, device, threads, model, trust_code, arithmetic: As in ``evaluate``.

    Returns:
        list[Prediction]: The path of each image, with its classes and their scores, most likely first.

    Raises:
        MicronetError: See the module's documentation.
    """

def inspect(
    artifact: str | Path,
    *,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Show a network file's layers, bits and history.

    Args:
        artifact: An artifact, an .onnx file from anywhere, a .packed file, or a folder from export.
        progress: As in ``train``.

    Returns:
        dict[str, object]: The figures by name.

    Raises:
        MicronetError: See the module's documentation.
    """

def verify(
    files: Sequence[str | Path],
    *,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, object]]:
    """Check that files are whole and hold what they say.

    Of artifacts and packed networks, every tensor's checksum is compared with its bytes. An artifact's network is
    built and its history replayed. No weight may hold NaN or infinity, and scales must be positive. An ONNX or
    packed file given together with the artifact that it was made from must compute what it computes.

    Args:
        files: Artifacts, checkpoints, .onnx and .packed files, and folders from export.
        progress: As in ``train``.
        model, trust_code: As in ``evaluate``.

    Returns:
        list[dict[str, object]]: What was found of each file, by name; ``problem`` if it is damaged or wrong.

    Raises:
        MicronetError: See the module's documentation.
    """

def sensitivity(
    artifact: Artifact | nn.Module | str | Path,
    *,
    plot: str | Path | None = None,
    method: Literal['iao', 'dorefa', 'lsq'] = 'iao',
    w_bits: int | str = 8,
    a_bits: int | str = 8,
    q_type: Literal['auto', 'sym', 'asym'] = 'auto',
    mode: Literal['qat', 'ptq', 'qaft'] = 'qat',
    data: str | Path | Batch | Iterable[Batch] | None = None,
    q_level: Literal['channel', 'layer'] = 'channel',
    weight_observer: Literal['minmax', 'moving-average'] = 'minmax',
    a_sign: Literal['auto', 'signed'] = 'auto',
    first_last: Literal['auto', 'float', '8bit', '8bit-input', 'same'] = 'auto',
    a_gain: float = 0.1,
    a_ste: Literal['ste', 'saturate', 'soft'] = 'saturate',
    w_ste: Literal['ste', 'saturate', 'soft'] = 'ste',
    w_center: bool = False,
    no_alpha: bool = False,
    bn_fuse: bool = False,
    include: Sequence[str | float] | str | None = None,
    exclude: Sequence[str | float] | str | None = None,
    keep_8bit: Sequence[str | float] | str | None = None,
    float_outputs: bool = False,
    calibrator: Literal['minmax', 'percentile', 'entropy', 'mse'] | None = None,
    percentile: float = 99.99,
    calib_batches: int | None = None,
    calib_data: str | Path | None = None,
    calib_cache: str | Path | None = None,
    float_weights: float | None = None,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Measure each layer's sensitivity to quantization.

    Quantizes one layer at a time and reports the signal-to-noise ratio of the scores and the accuracy drop on the
    validation images. The most sensitive layers are listed first.

    Args:
        artifact: An artifact (.safetensors).
        plot: Save a plot of the sensitivity as a .png or .svg file (needs matplotlib).
        data, task, image_size, limit, progress: As in ``train``.
        model, trust_code: As in ``evaluate``.
        method, w_bits, a_bits, q_type, mode, q_level, weight_observer, a_sign, first_last, a_gain, a_ste, w_ste,
            w_center, no_alpha, bn_fuse, include, exclude, keep_8bit, float_outputs, calibrator, percentile,
            calib_batches, calib_data, calib_cache, float_weights: As in ``quantize``.

    Returns:
        list[LayerSensitivity]: Each layer's signal-to-noise ratio in dB and accuracy drop, most sensitive first.

    Raises:
        MicronetError: See the module's documentation.
    """

def compress(
    artifact: Artifact | nn.Module | str | Path,
    *,
    max_drop: float = 1.0,
    minimize: Literal['latency', 'size'] | None = None,
    target_latency: float | None = None,
    target_size: float | None = None,
    runtime: str = 'onnxruntime',
    budget: str = '60m',
    no_training: bool = False,
    output: str | Path | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    metric: str | None = None,
    target_macs: float | None = None,
    batch: int = 1,
    threads: int = 1,
    device: str | None = None,
    seed: int = 1,
    force: bool = False,
    model: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    image_size: int | str | None = None,
    limit: int | None = None,
    skip_timing: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Find the smallest or fastest network that keeps its accuracy.

    Makes candidates that differ in channel widths, bits and layers that stay float, measures each in the runtime
    and on the validation images, and keeps the best. Each candidate is a recipe; the chosen one's is written as
    recipe.toml and gives the same network again. If the command is interrupted, run it again to continue.

    Args:
        artifact: A float artifact, or a float .onnx file, which can only be quantized.
        max_drop: Largest drop of the metric on the validation images, in points: hundredths of the metric.
        minimize: What to minimize. Default: latency, unless there is a target.
        target_latency: Fraction of the float network's latency in the runtime to reach.
        target_size: Fraction of the float network's file size in the runtime to reach.
        runtime: Where the network is to run: onnxruntime, openvino, ncnn, c, tensorrt, packed.
        budget: Time for the search, for example 90s, 30m or 2h (without a unit: minutes); what does not fit is
            left out.
        no_training: Do not train candidates; calibrate only.
        metric: Metric that may drop. Default: the task's main one.
        target_macs: Fraction of the multiply-accumulates (MACs) to reach.
        batch: Samples in a call when networks are timed.
        threads: Number of CPU threads of the runtime.
        device: Device for training: cpu, cuda or cuda:N; default: cuda if available, otherwise cpu.
        seed: Seed for shuffling, augmentation and the validation split.
        force: Start over in a folder that holds another search, or write among other files.
        output, data, task, image_size, limit, progress: As in ``train``.
        model, trust_code, skip_timing: As in ``evaluate``.

    Returns:
        Artifact: The network (``model``) with its ``history`` and ``metrics``.

    Raises:
        MicronetError: See the module's documentation.
    """

def run_recipe(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    data: str | Path | Batch | Iterable[Batch] | None = None,
    device: str | None = None,
    from_stage: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Row]:
    """Run a recipe, skipping stages that are unchanged.

    Interrupted stages are resumed. Changes to images in a folder are not detected; after such changes, use
    force=True. At the end, all files that the recipe created are compared.

    Args:
        recipe: A TOML file, or the name of a bundled recipe such as digits.
        output: Folder for the results; default: the folder set in the recipe.
        data: Data set for the first stage that uses one; overrides the recipe's.
        device: Device for every stage: cpu, cuda or cuda:N.
        from_stage: Rerun this stage and all later ones, even if they are unchanged.
        force: Rerun every stage, even if it is unchanged.
        progress: As in ``train``.

    Returns:
        list[Row]: One row per network, as ``evaluate`` returns it; drop and agreement are relative to the first.

    Raises:
        MicronetError: See the module's documentation.
    """

def card(
    file: str | Path,
    *,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write a model card from what a network file says of itself.

    It says what the network is, how it was made, on which data, what was measured, and its limits. What only you
    know, such as the licence, is left to fill in.

    Args:
        file: An artifact, an .onnx or .packed file, or a folder from export.
        force: Overwrite an existing file.
        output, progress: As in ``train``.

    Returns:
        str: The card, in Markdown.

    Raises:
        MicronetError: See the module's documentation.
    """

def doctor(
    *,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Show what is installed, and what will be fast here.

    Every package is imported in a process of its own, so that a broken one is named and breaks nothing. Nothing
    is written.

    Args:
        progress: As in ``train``.

    Returns:
        dict[str, object]: The figures by name.

    Raises:
        MicronetError: See the module's documentation.
    """
