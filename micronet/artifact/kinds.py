"""Kinds of files, recognised by their suffix, and the commands that take them."""

from pathlib import Path

from micronet.errors import MicronetError

# Suffix -> what such a file is, and what to do with it.
FILE_KINDS = {
    ".safetensors": (
        "an artifact",
        "convert it with micronet export-onnx or trt-build",
    ),
    ".onnx": ("an ONNX file", "use it with micronet evaluate, check-onnx, trt-build or quantize --mode ptq"),
    ".packed": ("a packed network", "use it with micronet evaluate, compare or predict"),
    ".engine": ("a TensorRT engine", "use it with micronet trt-eval, evaluate or compare"),
    ".pth": ("a PyTorch checkpoint", "import it with micronet import --model NAME --weights FILE"),
    ".pt": ("a PyTorch checkpoint", "import it with micronet import --model NAME --weights FILE"),
    ".toml": ("a recipe", "run it with micronet run"),
}


def check_file_kind(path: Path, *taken: str) -> None:
    """Raise MicronetError if a path is a folder, or a known kind of file whose suffix is not in ``taken``.

    Unknown suffixes pass; such a file is checked when it is opened.
    """
    expected = " or ".join(f"{FILE_KINDS[suffix][0]} ({suffix})" for suffix in taken)
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; expected {expected}; name a file in it")
    what, instead = FILE_KINDS.get(path.suffix, ("", ""))
    if what and path.suffix not in taken:
        raise MicronetError(f"{path} is {what}; expected {expected}; {instead}")
