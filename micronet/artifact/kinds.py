"""Which kind of file a command was given, told from its name before any work, and what takes such a file instead."""

from pathlib import Path

from micronet.errors import MicronetError

# Suffix -> what such a file is, and what to type with it.
KINDS = {
    ".safetensors": ("an artifact", "micronet export-onnx makes an .onnx file of it, trt-build an engine"),
    ".onnx": ("an ONNX file", "micronet evaluate, check-onnx, trt-build and quantize --mode ptq take it"),
    ".packed": ("a packed network", "micronet evaluate, compare and predict take it"),
    ".engine": ("a TensorRT engine", "micronet trt-eval, evaluate and compare take it"),
    ".pth": ("a PyTorch checkpoint", "micronet import --model NAME --weights brings it in"),
    ".pt": ("a PyTorch checkpoint", "micronet import --model NAME --weights brings it in"),
    ".toml": ("a recipe", "micronet run takes it"),
}


def check_file_kind(path: Path, *taken: str) -> None:
    """Raise MicronetError where a path is a folder, or by its suffix a file of none of the kinds ``taken``.

    A file whose suffix tells nothing passes: whoever opens it looks at its bytes.
    """
    wanted = " or ".join(f"{KINDS[suffix][0]} ({suffix})" for suffix in taken)
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; expected {wanted}: name a file in it")
    what, instead = KINDS.get(path.suffix, ("", ""))
    if what and path.suffix not in taken:
        raise MicronetError(f"{path} is {what}; expected {wanted}: {instead}")
