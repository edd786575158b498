"""The spellings of the micronet of 2021: accepted if they mean the same today, answered with today's command if not."""

import json
from collections.abc import Callable
from pathlib import PurePath

from micronet.errors import MicronetError

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
    "--ptq-batch": "--calib-batches",
    "--save": "--output",
    "--W": "--w-bits",
    "--A": "--a-bits",
}
ORIGINAL_WIDTHS = ("154", "162", "144", "304", "320", "320", "608", "584")  # what it printed for nin_gc
_ARTIFACT_KNOWS = ("prune", "finetune", "bn-fuse")  # read what an artifact is from the artifact
_PRUNED = "pruned networks are now ordinary artifacts; run: micronet quantize pruned.safetensors"
_ANSWERS = {
    "--ptq": "post-training quantization is now a mode; run: micronet quantize ARTIFACT --mode ptq",
    "--ptq-control": "post-training quantization is now a mode; run: micronet quantize ARTIFACT --mode ptq",
    "--qaft": "quantization-aware finetuning is now a mode; run: micronet quantize ARTIFACT --mode qaft",
    "--evaluate": "evaluation is now a separate command; run: micronet evaluate FILE",
    "--layers": "layers are now found by tracing the network; drop this option",
    "--quant-type": "artifacts now record how they were created; drop this option",
    "--pretrained-model": "artifacts now record how they were created; drop this option",
    "--bn-fuse-calib": "this option no longer exists; drop it (quantize --bn-fuse folds batch norms during training)",
    "--eval-batch-size": "the batch size does not affect evaluation results; drop this option",
    "--num-workers": "the number of data-loading processes is now chosen automatically; drop this option",
    "--start-epochs": "to continue an interrupted run, rerun its command with --resume",
    "--prune-quant": _PRUNED,
    "--prune-qat": _PRUNED,
    "--prune-qaft": "run: micronet quantize pruned-int8.safetensors --mode qaft",
}


def modern(arguments: list[str]) -> list[str]:
    """Return a command line in today's spelling; raise MicronetError if an old option has become something else."""
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
        if name in _ANSWERS:
            raise MicronetError(f"{typed}: {_ANSWERS[name]}")
        command = next((earlier for earlier in words if not earlier.startswith("-")), "")
        rewrite = _REWRITTEN.get(name) or _ONE_COMMAND.get((command, name))
        if rewrite is not None:
            words += rewrite(typed, command, rest)
        elif equals:
            rest.pop(0)
            words.append(f"{_NAMES.get(name, name)}={_value(name, value)}")
        else:
            words.append(_NAMES.get(name, name))
            if name in _VALUES and rest:
                words.append(_value(name, rest.pop(0)))
    return words


def _value(name: str, typed: str) -> str:
    """Return today's word for an option's number; raise MicronetError for a number that it never had."""
    known = _VALUES.get(name, {})
    if known and typed.isdigit() and typed not in known:
        expected = ", ".join(f"{word} ({number})" for number, word in known.items())
        raise MicronetError(f"{name} is {typed}; expected {expected}")
    return known.get(typed, typed)


def _artifact(option: str, command: str, path: str) -> str:
    """Return the path if it names an artifact; raise MicronetError with the import command if it is a checkpoint."""
    if path.endswith(".safetensors"):
        return path
    stem = PurePath(path).stem
    model = "nin_gc" if "nin_gc" in stem else "nin"
    raise MicronetError(
        f"{option} {path}: checkpoints must be imported first; run: micronet import --model {model} --weights {path} "
        f"-o {stem}.safetensors, then micronet {command} {stem}.safetensors"
    )


# Each takes the option, the command and the words after the option, and returns the words that replace it.


def _gpu(option: str, command: str, rest: list[str]) -> list[str]:
    numbers = rest.pop(0) if rest else "0"
    if not all(number.isdigit() for number in numbers.split(",")):
        raise MicronetError(
            f"--gpu_id is {numbers}; expected GPU numbers; use --device cuda:0, or --device 0,1 for two GPUs"
        )
    return ["--device", numbers if "," in numbers else f"cuda:{numbers}"]


def _sparse(option: str, command: str, rest: list[str]) -> list[str]:
    if command == "sparse-train":
        return []
    raise MicronetError(f"{option}: sparse training is now a separate command; run: micronet sparse-train --s 1e-4")


def _fold(option: str, command: str, rest: list[str]) -> list[str]:
    """``--bn_fuse 0`` and ``1``: a flag today."""
    value = rest.pop(0) if rest and rest[0] in ("0", "1") else "1"
    return ["--bn-fuse"] if value == "1" else []


def _refine(option: str, command: str, rest: list[str]) -> list[str]:
    """``--refine FILE``: the file is the command's artifact today."""
    target = "finetune" if command == "train" else command
    if not rest:
        raise MicronetError(
            f"{option} needs a file; pass it as an argument, for example: micronet {target} pruned.safetensors"
        )
    path = _artifact(option, target, rest.pop(0))
    if command == "train":
        raise MicronetError(
            f"{option} {path}: train always starts from scratch; to continue training this network, run: micronet "
            f"finetune {path}"
        )
    return [path]


def _widths(option: str, command: str, rest: list[str]) -> list[str]:
    """``--gc_refine 154 162 ...``: the widths of the pruned nin_gc, which prune cuts with its weights."""
    widths = []
    while rest and rest[0].isdigit():
        widths.append(rest.pop(0))
    widths = widths or list(ORIGINAL_WIDTHS)
    if command != "prune":
        arguments = json.dumps({"widths": [int(width) for width in widths]})
        raise MicronetError(
            f"{option} only applies to micronet prune, which keeps the trained weights; to train nin_gc with these "
            f"widths from scratch, run: micronet train --model nin_gc --model-args '{arguments}'"
        )
    return ["--widths", ",".join(widths)]


def _model_type(option: str, command: str, rest: list[str]) -> list[str]:
    """``--model_type 0``: an artifact records its network."""
    value = _value("--model-type", rest.pop(0)) if rest else ""
    return [] if command in _ARTIFACT_KNOWS else ["--model", *filter(None, [value])]


def _drop(option: str, command: str, rest: list[str]) -> list[str]:
    """``bn_fuse.py --W 2``: an artifact records its bits."""
    if rest and rest[0].isdigit():
        rest.pop(0)
    return []


def _prune_model(option: str, command: str, rest: list[str]) -> list[str]:
    """``prune --model FILE``: the file is the artifact today; ``net.py:Net`` still names a network's code."""
    if rest and rest[0].endswith((".safetensors", ".pth", ".pt")):
        return [_artifact(option, command, rest.pop(0))]
    return [option]


def _resume(option: str, command: str, rest: list[str]) -> list[str]:
    """``--resume FILE``: a flag today."""
    if rest and rest[0].endswith((".pth", ".pt")):
        raise MicronetError(
            f"{option} does not take a file; rerun the interrupted command with {option} to continue from its "
            f"checkpoint. To start from the weights in {rest[0]}, run: micronet import --model nin --weights {rest[0]}"
        )
    return [option]


_Rewrite = Callable[[str, str, list[str]], list[str]]
_REWRITTEN: dict[str, _Rewrite] = {
    "-sr": _sparse,
    "--sparsity-regularization": _sparse,
    "--bn-fuse": _fold,
    "--cpu": lambda *_: ["--device", "cpu"],
    "--gpu-id": _gpu,
    "--refine": _refine,
    "--prune-refine": _refine,
    "--gc-refine": _widths,
    "--gc-prune-refine": _widths,
    "--model-type": _model_type,
    "--resume": _resume,
}
_ONE_COMMAND: dict[tuple[str, str], _Rewrite] = {
    ("prune", "--model"): _prune_model,
    ("bn-fuse", "--W"): _drop,
    ("bn-fuse", "--A"): _drop,
}
