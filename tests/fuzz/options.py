"""Command lines with one odd value for one option: every option of every command that runs here."""

import shlex

from micronet.core.config import flag
from micronet.stages.stage import find

TRAIN = "--limit 60 --batch-size 20 --epochs 1 --max-time 0.02 -o out/x.safetensors -q --force"
BASES = {
    "train": f"--data data.npz --model nin --width 0.1 {TRAIN}",
    "import": "--model nin --width 0.1 --data data.npz -o out/x.safetensors --force",
    "sparse-train": f"float.safetensors {TRAIN}",
    "prune": "float.safetensors --percent 0.3 --limit 20 --skip-timing -o out/x.safetensors -q --force",
    "finetune": f"float.safetensors {TRAIN}",
    "quantize": f"float.safetensors {TRAIN}",
    "bn-fuse": "float.safetensors -o out/x.safetensors -q --force",
    "export-onnx": "float.safetensors --limit 20 --skip-timing -o out/x.onnx -q --force",
    "check-onnx": "int8.onnx",
    "pack": "int8.safetensors --limit 20 --skip-timing -o out/x.packed -q --force",
    "evaluate": "int8.packed --limit 20 --skip-timing",
    "compare": "float.onnx int8.packed --limit 20 --skip-timing",
    "predict": "float.onnx images/0.png",
    "inspect": "float.safetensors",
    "verify": "float.safetensors",
    "sensitivity": "float.safetensors --limit 20 --calib-batches 1",
}
VALUES = (
    "", "-1", "0", "1", "2", "0.5", "1e-320", "1e308", "1e400", "nan", "inf", "2147483648", "9223372036854775808",
    "99999999999999999999999999", "x", "a,b", ",", "none", "../x", "/", "/dev/null", "/dev/full", "images", "*", "{}",
    "float.onnx", "data.npz", "recipe.toml", "os:system", "nope.py:Net", "é", "\x1b[2J", "--force", '{"width": -1}',
)  # fmt: skip
# Unbounded work by request (steps of a compiler, processes), or no value.
LEFT_OUT = {"processes", "compile", "force", "json", "quiet", "trust_code", "resume", "max_time"}

LONG = {("calib_data", "none")}  # generates images, which takes as long as training on them


def option_commands() -> list[str]:
    """Return the command lines."""
    return [
        f"{name} {base} {option.about['option'] or flag(option.name)}={shlex.quote(value)}"
        for name, base in BASES.items()
        for option in find(name).options()
        if option.name not in LEFT_OUT and not option.about["argument"] and option.field.type is not bool
        for value in VALUES
        if (option.name, value) not in LONG
    ]
