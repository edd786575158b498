"""The spellings of the micronet of 2021: taken where ours means the same, answered with ours where it does not."""

import json
from collections.abc import Callable

from micronet.errors import MicronetError

_GROUPED = ("--gc-refine", "--gc-prune-refine")
_VALUES = {
    "--q-type": {"0": "sym", "1": "asym"},
    "--q-level": {"0": "channel", "1": "layer"},
    "--weight-observer": {"0": "minmax", "1": "moving-average"},
    "--W": {"2": "binary", "3": "ternary", "32": "32"},
    "--A": {"2": "binary", "32": "32"},
    "--model-type": {"0": "nin", "1": "nin_gc", "2": "resnet18"},
}
_NAMES = {
    "--normal-regular": "--regular",
    "--calibration-cache": "--calib-cache",
    "--wd": "--weight-decay",
    "--train-batch-size": "--batch-size",
    "--end-epochs": "--epochs",
    "--model-type": "--model",
    "--save": "--output",
    "--W": "--w-bits",
    "--A": "--a-bits",
}
ORIGINAL_WIDTHS = ("154", "162", "144", "304", "320", "320", "608", "584")  # that it printed for nin_gc
_SPARSE = "the sparsity penalty is a command of its own: micronet sparse-train [ARTIFACT] --s 1e-4"
_ANSWERS = {
    "-sr": _SPARSE,
    "--sparsity-regularization": _SPARSE,
    "--ptq": "micronet quantize ARTIFACT --mode ptq",
    "--qaft": "micronet quantize ARTIFACT --mode qaft",
    "--evaluate": "measuring is a command of its own: micronet evaluate FILE",
    "--layers": "layers are found by tracing the network; leave it out",
    "--quant-type": "an artifact knows what it is; leave it out",
    "--eval-batch-size": "evaluation chooses its batches itself; leave it out",
    "--start-epochs": "go on with an interrupted training with --resume",
    "--prune-quant": "give the pruned artifact itself: micronet quantize pruned.safetensors",
    "--prune-qat": "give the pruned artifact itself: micronet quantize pruned.safetensors",
}


def modern(arguments: list[str]) -> list[str]:
    """Return a command line in today's spelling. Raises MicronetError where an old option has become something else."""
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        typed, equals, value = word.partition("=")
        name = typed.replace("_", "-") if typed.startswith("--") else typed
        if equals:
            rest.insert(0, value)
        if name in _GROUPED and "prune" not in words:
            numbers = [int(word) for word in _grouped_widths(rest)[1].split(",")]
            raise MicronetError(
                f"{typed} is for micronet prune ARTIFACT, which cuts nin_gc with its weights; to train that network "
                f"from scratch: micronet train --model nin_gc --model-args '{json.dumps({'widths': numbers})}'"
            )
        if name in _ANSWERS:
            raise MicronetError(f"{typed}: {_ANSWERS[name]}")
        if name in _REWRITTEN:
            words += _REWRITTEN[name](rest)
        elif equals:
            rest.pop(0)
            words.append(f"{_NAMES.get(name, name)}={_value(name, value)}")
        else:
            words.append(_NAMES.get(name, name))
            if name in _VALUES and rest:
                words.append(_value(name, rest.pop(0)))
    return words


def _value(name: str, typed: str) -> str:
    """Return today's word for an option's number. Raises MicronetError for a number it never had."""
    known = _VALUES.get(name, {})
    if known and typed.isdigit() and typed not in known:
        allowed = ", ".join(f"{word} ({number})" for number, word in known.items())
        raise MicronetError(f"{name} is {typed}; allowed: {allowed}")
    return known.get(typed, typed)


def _cpu(rest: list[str]) -> list[str]:
    return ["--device", "cpu"]


def _gpu(rest: list[str]) -> list[str]:
    number = rest.pop(0) if rest else "0"
    if not number.isdigit():
        raise MicronetError(f"--gpu_id {number}: one device a command: --device cuda:0")
    return ["--device", f"cuda:{number}"]


def _fold(rest: list[str]) -> list[str]:
    """``--bn_fuse 0`` and ``1``: a flag now."""
    wanted = rest.pop(0) if rest and rest[0] in ("0", "1") else "1"
    return ["--bn-fuse"] if wanted == "1" else []


def _refine(rest: list[str]) -> list[str]:
    """``--refine FILE``: the file is the command's artifact now."""
    if not rest:
        raise MicronetError("--refine: give the artifact itself, for example micronet finetune pruned.safetensors")
    path = rest.pop(0)
    if not path.endswith(".safetensors"):
        raise MicronetError(
            f"--refine {path}: bring the checkpoint in first, micronet import --model nin --weights {path}, "
            "then give the artifact itself, for example micronet finetune nin.safetensors"
        )
    return [path]


def _grouped_widths(rest: list[str]) -> list[str]:
    """``--gc_refine 154 162 ...``: the widths of the pruned nin_gc, which prune cuts with its weights."""
    widths = []
    while rest and rest[0].isdigit():
        widths.append(rest.pop(0))
    return ["--widths", ",".join(widths or ORIGINAL_WIDTHS)]


_REWRITTEN: dict[str, Callable[[list[str]], list[str]]] = {
    "--bn-fuse": _fold,
    "--cpu": _cpu,
    "--gpu-id": _gpu,
    "--refine": _refine,
    "--prune-refine": _refine,
    "--gc-refine": _grouped_widths,
    "--gc-prune-refine": _grouped_widths,
}
