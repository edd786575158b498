#!/usr/bin/env python
"""Prune many people's networks by half, and hold each against the whole network with the same channels silenced.

    python scripts/prune_zoo.py [NAME ...] [--timm | --others] [--regular 8] [--size N] [--no-onnx] [--limit SECONDS]
        [--torch-pruning]

Every classification network of torchvision; ``--timm``: timm networks of different families; ``--others``: detectors
and segmenters of torchvision, ultralytics and segmentation-models-pytorch, without weights. Needs those packages.

Every weight gets distinct random values. Half of each layer's channels go, judged by their weights' length. The check
knows nothing of micronet: it finds out which of a weight's inputs were cut by looking for the pruned network's values
in it, sets those inputs' weights to zero in a copy of the whole network, and compares what the two forwards return, in
double precision. The pruned network is also run backward, saved, loaded and, for torchvision, exported to ONNX. It
counts where at least 40 % of the channels that could be cut and 25 % of the parameters went. Prints a Markdown table
for BENCHMARKS.md, with the CPU seconds of the pruning. ``--torch-pruning``: the same by Torch-Pruning with its defaults
(half of the channels, the class scores ignored, attention's ``num_heads`` named); it counts where the pruned network
runs forward and backward and 25 % of the parameters went, whether or not it equals the masked one.
"""

import argparse
import copy
import gc
import json
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision import models

from micronet.artifact.artifact import Artifact, load, save, versions
from micronet.artifact.header import StageRecord
from micronet.graph.plain_weights import with_plain_weights
from micronet.models import transformer
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.onnx.export import to_onnx
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model

TIMM = """
coat_tiny coatnet_nano_rw_224 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto cpubone_b0_bfrobust
cs3darknet_s cspresnet50 davit_tiny densenet121 dla46_c dpn48b eca_nfnet_l0 ecaresnet26t edgenext_xx_small
efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224
fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_050 ghostnetv3_050 gmlp_ti16_224
hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 legacy_xception levit_128s lowformer_b0 mambaout_femto
mixer_s16_224 mixnet_s mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs
mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002
regnety_002 regnetz_b16 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnetblur50 resnetv2_50
resnetv2_50x1_bit rexnet_100 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs
swin_tiny_patch4_window7_224 tf_efficientnet_lite0 tiny_vit_5m_224 tinynet_e twins_svt_small visformer_tiny
vit_tiny_patch16_224 vovnet39a xcit_nano_12_p16_224
""".split()  # noqa: SIM905
OTHERS = """
torchvision:fcn_resnet50 torchvision:deeplabv3_mobilenet_v3_large torchvision:lraspp_mobilenet_v3_large
torchvision.models.detection.backbone_utils:resnet50 torchvision.models.detection.backbone_utils:mobilenet_v3_large
ultralytics:yolov8n.yaml ultralytics:yolo11n.yaml ultralytics:yolov8n-seg.yaml ultralytics:yolov5n.yaml
segmentation_models_pytorch:Unet segmentation_models_pytorch:Linknet segmentation_models_pytorch:FPN
segmentation_models_pytorch:DeepLabV3Plus segmentation_models_pytorch:UnetPlusPlus
""".split()  # noqa: SIM905
Prune = Callable[[str, argparse.Namespace, Path], tuple[str, bool]]
ULTRALYTICS = {"-seg": "SegmentationModel", "-pose": "PoseModel", "-obb": "OBBModel", "-cls": "ClassificationModel"}
SMALLEST = {"inception_v3": 299}  # its pools leave nothing of less than this


def build(name: str, size: int) -> tuple[nn.Module, ModelSpec | None, int]:
    """Build a network without weights; return it, its spec if micronet can load it, and its input's height."""
    package, _, own = name.rpartition(":")
    if package == "ultralytics":
        from ultralytics.nn import tasks

        kind = next((kind for part, kind in ULTRALYTICS.items() if part in own), "DetectionModel")
        return getattr(tasks, kind)(own, verbose=False), None, size
    if package == "segmentation_models_pytorch":
        import segmentation_models_pytorch

        return getattr(segmentation_models_pytorch, own)("resnet18", encoder_weights=None), None, size
    if package == "torchvision.models.detection.backbone_utils":  # with frozen norms
        parts = models.detection.backbone_utils
        if own.startswith("resnet"):
            return parts.resnet_fpn_backbone(backbone_name=own, weights=None), None, size
        return parts.mobilenet_backbone(own, weights=None, fpn=True), None, size
    if package == "timm":
        return build_timm(own, size)
    own_arguments: dict[str, Any] = {"weights_backbone": None} if package == "torchvision" else {}
    spec = ModelSpec(f"torchvision:{own}", own_arguments)
    return build_model(spec), spec, SMALLEST.get(own, size)


def build_timm(name: str, size: int) -> tuple[nn.Module, ModelSpec, int]:
    """Build a network of timm for a small input, or for its own size if it takes no other."""
    import timm

    for arguments in ({"img_size": size}, {}):
        with suppress(TypeError, AssertionError):
            model = timm.create_model(name, num_classes=10, **arguments).eval()
            for own in (size, model.default_cfg["input_size"][1]):
                with suppress(RuntimeError, AssertionError), torch.no_grad():
                    model(torch.rand(1, 3, own, own))
                    return (
                        model,
                        ModelSpec("timm:create_model", {"model_name": name, "num_classes": 10, **arguments}),
                        own,
                    )
    raise ValueError("timm builds no such network")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every weight distinct values of a fitting size, and norms values that are far from their initial ones."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.uniform_(0.5, 1.5).mul_(torch.sign(torch.rand_like(parameter) - 0.2))
            continue
        n, inputs = parameter.numel(), parameter[0].numel()
        order = torch.randperm(n)
        if n < 2**24:
            values = (2 * order + 1 - n) / n
        else:  # not distinct in float32; consecutive floats up to 1, half of them negative, are
            values = (0x3F800000 - order // 2).int().view(torch.float32) * (1 - 2 * (order % 2))
        parameter.copy_(values.view(parameter.shape) * 2.0 ** round(0.5 * torch.tensor(3 / inputs).log2().item()))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


@torch.no_grad()
def mask(whole: nn.Module, pruned: nn.Module) -> nn.Module:
    """Return a copy of the whole network whose weights are zero at the inputs that the pruned network lacks."""
    masked = copy.deepcopy(whole)
    smaller = dict(pruned.named_parameters())
    for owner_name, owner in masked.named_modules():
        for name, weight in owner.named_parameters(recurse=False):
            kept = smaller[f"{owner_name}.{name}".lstrip(".")]
            if weight.dim() < 2 or weight.shape == kept.shape:
                continue
            values, order = weight.flatten().sort()
            places = order[torch.searchsorted(values, kept.flatten())]
            if not torch.equal(weight.flatten()[places], kept.flatten()):
                raise ValueError(f"{owner_name}.{name} has values that the whole network does not have")
            stays = torch.zeros(weight.numel(), dtype=torch.bool)
            stays[places] = True
            stays = stays.view(weight.shape)
            rows = stays.flatten(1).any(1)  # rows that went are read by nobody, unless they are inputs
            if not getattr(owner, "transposed", False):
                stays[~rows] = True
            weight.mul_(stays)
    return masked


@torch.no_grad()
def difference(left: nn.Module, right: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two networks' outputs in double precision, relative to the outputs' norm."""
    with torch.random.fork_rng():
        outputs = [tree_leaves(copy.deepcopy(model).double().eval()(images.double())) for model in (left, right)]
    pairs = [(x.double(), y.double()) for x, y in zip(*outputs, strict=True) if isinstance(x, Tensor)]
    return max(float((x - y).norm() / (x.norm() + 1e-30)) for x, y in pairs)


def backward(model: nn.Module, images: Tensor) -> list[str]:
    """Run a network backward in training mode; return the parameters without a gradient."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.__module__.startswith("torch.nn"):
            module.eval()  # two images are too few for statistics at 1 x 1
    model.requires_grad_(True)
    leaves = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([leaf.sum() for leaf in leaves]).sum().backward()
    model.eval()
    lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    return lacking


def prune_one(name: str, asked: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Prune one network; return its row of the table, and whether it counts."""
    torch.manual_seed(0)
    model, spec, size = build(name, asked.size)
    randomize(model.eval())
    images = torch.rand(2, 3, size, size)
    before = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    config = PruneConfig(0.5, regular=asked.regular, criterion="l2", scope="layer")
    given, (model, how) = model, with_plain_weights(model, images, "pruning")
    made_plain = difference(given, model, images)  # which stores weights in float32 that the forward computes
    if how:
        randomize(model)  # computed weights are not distinct
    pruned, record, plan = prune_model(model, config, images)
    record = replace(record, result={**record.result, **how})
    seconds = time.process_time() - start
    whole = transformer.split_layers(model, record.result.get("attention", []))
    error = difference(mask(whole, pruned), pruned, images)
    lacking = backward(pruned, images)
    lacking = sorted(set(lacking) - set(backward(model, images))) if lacking else []
    same = reloads(pruned, record, spec, images, folder)
    if asked.onnx and spec is not None:
        to_onnx(Artifact(pruned, spec, [StageRecord("import"), record]), images)
    share, params = plan.cut / plan.total, 1 - sum(p.numel() for p in pruned.parameters()) / before
    pinned = 1 - plan.total / sum(group.before for group in plan.groups.values())
    wrong = (
        "differs from the masked network"
        if error > 1e-9 or made_plain > 1e-4
        else "reloads otherwise"
        if not same
        else ""
    )
    note = wrong or ", ".join(lacking[:2])
    counts = share >= 0.4 and params >= 0.25 and not note
    reasons = Counter(
        group.note.partition(" ")[2] for group in plan.groups.values() if group.note and group.after == group.before
    )
    often = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    return (
        f"| {name} | {size} | {share:.0%} | {pinned:.0%} | {before / 1e6:.1f} | {params:.0%} | {error:.0e} "
        f"| {seconds:.1f} | {'yes' if counts else 'no: ' + (note or often)} |"
    ), counts


def reloads(pruned: nn.Module, record: StageRecord, spec: ModelSpec | None, images: Tensor, folder: Path) -> bool:
    """Return True if a pruned network computes the same after it was saved and loaded."""
    if spec is None:
        return json.loads(json.dumps(record.result)) == record.result
    save(Artifact(pruned, spec, [StageRecord("import"), record]), folder / "pruned.safetensors")
    again = load(folder / "pruned.safetensors", trust_code=True).model.eval()
    with torch.no_grad():
        return all(map(torch.equal, *(tree_leaves(model(images)) for model in (again, pruned))))


def prune_by_torch_pruning(name: str, asked: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Prune one network by Torch-Pruning; return its row, and whether it counts."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model, _, size = build(name, asked.size)
    randomize(model.eval())
    whole = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    images = torch.rand(2, 3, size, size)
    classes = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) in (10, 1000)
    ]
    attentions = [module for module in model.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]
    heads = {module.qkv: module.num_heads for module in attentions if hasattr(module, "num_heads")}
    importance, multiple = tp.importance.GroupMagnitudeImportance(p=2), asked.regular if asked.regular > 1 else None
    settings = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": classes, "round_to": multiple}
    start = time.process_time()
    tp.pruner.BasePruner(model, images, num_heads=heads, **settings).step()
    for module in (module for module in attentions if hasattr(module, "head_dim")):  # each head becomes narrower
        module.attn_dim = module.qkv.out_features // 3
        module.head_dim = module.attn_dim // module.num_heads
    seconds = time.process_time() - start
    params = 1 - sum(p.numel() for p in model.parameters()) / before
    backward(model, images)
    try:
        error = f"{difference(mask(whole, model), model, images):.0e}"
    except Exception:  # it changed values or names, so the whole network cannot be masked alike
        error = "?"
    counts = params >= 0.25
    row = f"| {name} | {size} | | | {before / 1e6:.1f} | {params:.0%} | {error} | {seconds:.1f} "
    return f"{row}| {'yes' if counts else 'no'} |", counts


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this context once it has computed for this long; 0: never."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds and 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Prune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--timm", action="store_true")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--size", type=int)
    parser.add_argument("--regular", type=int)
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("--limit", type=float, default=0, help="CPU seconds for one network; default: all it takes")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.timm or asked.others:
        asked.size, asked.onnx = asked.size or (64 if asked.timm else 128), False
    asked.size, asked.regular = asked.size or 224, asked.regular or (1 if asked.timm or asked.others else 8)
    names = asked.names or (TIMM if asked.timm else OTHERS if asked.others else models.list_models(module=models))
    names = [f"timm:{name}" for name in names] if asked.timm else names
    print(f"{describe_machine()}, {versions()}\n")
    print(
        "| network | pixels | cut | pinned | parameters, M | fewer | difference | seconds | counts |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    )
    total, prune = 0, prune_by_torch_pruning if asked.torch_pruning else prune_one
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                with limited(asked.limit):
                    row, counts = prune(name, asked, Path(folder))
            except Exception as error:  # a zoo of failures is what this counts
                why = (str(error).splitlines() or [type(error).__name__])[0][:200]
                row, counts = f"| {name} | | | | | | | | no: {why} |", False
            total += counts
            print(row, flush=True)
            gc.collect()
    print(f"\n{total} of {len(names)} networks count.")


if __name__ == "__main__":
    main()
