"""The settings of a TensorRT engine. No torch here, so ``--help`` stays fast."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from micronet.core.config import Settings, flag, setting
from micronet.errors import MicronetError

Shape = tuple[int, ...]
USUAL_BATCHES = (1, 8, 32)  # smallest, usual and largest
SHAPES = ("min_shape", "opt_shape", "max_shape")
GIB = 2**30


class Profile(NamedTuple):
    """Shapes of the input that an engine is built for: the smallest, the one it is tuned for, the largest."""

    smallest: Shape
    usual: Shape
    largest: Shape


@dataclass(frozen=True)
class BuildConfig(Settings):
    """TensorRT engine."""

    precision: Literal["auto", "fp32", "fp16", "int8"] = setting(
        "auto",
        "Precision of the engine. auto: int8 if the network is quantized, otherwise fp32. For int8, float networks "
        "are calibrated first.",
        basic=True,
    )
    min_shape: str | None = setting(
        None, "Minimum input shape, NxCxHxW; separate multiple profiles with commas. Default: batch 1.", basic=True
    )
    opt_shape: str | None = setting(None, "Input shape to optimize for. Default: batch 8.", basic=True)
    max_shape: str | None = setting(None, "Maximum input shape. Default: batch 32.", basic=True)
    workspace: float = setting(1.0, "Maximum GPU memory for scratch space, in GiB.", low=0.001, high=1024)
    optimization_level: int = setting(
        3, "Optimization level, from 0 (fast build) to 5 (exhaustive search for fast kernels).", low=0, high=5
    )
    timing_cache: Path | None = setting(
        None,
        "File of kernel timings that makes later builds faster; read if it exists, then updated. TensorRT only.",
        place="file",
    )
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = setting(
        "auto",
        "Library to use: TensorRT must build on the GPU that will run the engine; TensorRT-RTX can build on any "
        "machine.",
        basic=True,
    )
    compute_capability: str | None = setting(
        None,
        "Compute capabilities that TensorRT-RTX builds for, for example 8.6 or 8.6,8.9; default: all supported ones.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in (self.compute_capability or "").split(","):
            if part and not re.fullmatch(r"\s*\d{1,2}\.\d\s*", part):
                raise MicronetError(f"--compute-capability is {part!r}; expected a number such as 8.6")
        given = [name for name in SHAPES if getattr(self, name) is not None]
        if given and len(given) < len(SHAPES):
            missing = [flag(name) for name in SHAPES if name not in given]
            raise MicronetError(f"a profile needs all three shapes; add {' and '.join(missing)}")
        _ = self.profiles

    @property
    def profiles(self) -> list[Profile]:
        """The profiles given; empty if they follow from the input."""
        if self.min_shape is None or self.opt_shape is None or self.max_shape is None:
            return []
        columns = [[_parse(part, name) for part in getattr(self, name).split(",")] for name in SHAPES]
        if len({len(column) for column in columns}) > 1:
            raise MicronetError(
                "--min-shape, --opt-shape and --max-shape have different numbers of profiles; list one shape per "
                "profile in each"
            )
        profiles = [Profile(*shapes) for shapes in zip(*columns, strict=True)]
        for profile in profiles:
            axes = zip(*profile, strict=False)
            if len(set(map(len, profile))) > 1 or any(list(sizes) != sorted(sizes) for sizes in axes):
                shown = ", ".join("x".join(map(str, shape)) for shape in profile)
                raise MicronetError(f"a profile's shapes must satisfy min <= opt <= max; got {shown}")
        return profiles


def _parse(text: str, name: str) -> Shape:
    parts = text.strip().lower().split("x")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in parts):
        raise MicronetError(f"{flag(name)} is {text!r}; expected sizes separated by x, for example 1x3x224x224")
    return tuple(map(int, parts))
