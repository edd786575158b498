"""What a file records of the data that a network is for, in JSON values; read without torch."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from micronet import registry
from micronet.core.image_size import ImageSize, sides
from micronet.core.parse import make_record
from micronet.errors import MicronetError, unknown
from micronet.models.spec import LARGEST_INPUT, check_described

LARGEST_SIDE = 2**31  # of images and limits


class NoDataError(MicronetError):
    """Nothing names the data that a command needs."""


@dataclass(frozen=True)
class DataSpec:
    """The data that a network is for, and how images become its input; JSON values only."""

    name: str | None = None
    classes: list[str] | None = None
    channels: int | None = None
    image_size: ImageSize | None = None  # in pixels
    mean: list[float] | None = None  # per channel, of pixels scaled to 0..1
    std: list[float] | None = None
    augment: str = "none"  # one of batches.AUGMENTATIONS
    limit: int | None = None  # the maximum number of training images, and of test images
    seed: int = 1  # of the validation split and of the limit's choice
    task: str = "classification"  # one of registry.TASKS, or a user's path/to/file.py:Task
    inputs: list[dict[str, Any]] | None = None  # if not images: "shape" without the batch, "dtype", "name" if known

    @classmethod
    def from_json(cls, value: Any) -> "DataSpec":
        """Build a spec from its JSON object; an empty one from None. Raise MicronetError if it is damaged."""
        try:
            spec = make_record(cls, {} if value is None else value)
            check_described(spec.inputs or [])
            spec._check_numbers()
            return spec
        except (ValueError, OverflowError) as error:  # the second by an integer beyond floats
            raise MicronetError(
                f"the file's record of its data set is corrupted ({error}); recreate the file"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return the spec as a JSON object; of a classifier of images as earlier versions wrote it."""
        fields = asdict(self)
        if self.task == "classification":
            del fields["task"]
        if self.inputs is None:
            del fields["inputs"]
        return fields

    def _check_numbers(self) -> None:
        """Raise ValueError if a number makes no sense."""
        if isinstance(self.image_size, list) and not len(self.image_size) == len({*self.image_size}) == 2:
            raise ValueError(f"its image_size is {self.image_size}")
        size = 1 if self.image_size is None else self.image_size
        height, width = sides(size)
        numbers = (("channels", self.channels), ("image_size", height), ("image_size", width), ("limit", self.limit))
        for name, value in numbers:
            if value is not None and not 1 <= value <= LARGEST_SIDE:
                raise ValueError(f"its {name} is {value:,}")
        if (self.channels or 1) * height * width > LARGEST_INPUT:
            raise ValueError(f"its images of {height:,}x{width:,} have more than {LARGEST_INPUT:,} values")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"its seed is {self.seed:,}")
        mean, std = self.mean, self.std
        if (mean is None) != (std is None):
            raise ValueError("it has one of mean and std")
        if mean is not None and std is not None:
            if not len(mean) == len(std) == (self.channels or len(mean)) > 0:
                raise ValueError("its mean and std are not one number per channel")
            if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
                raise ValueError("its mean and std are not finite, or its std not positive")


def unknown_data(name: str) -> MicronetError:
    """Return the error for a name that is no data set's, or a path of nothing."""
    if Path(name).is_file():
        return MicronetError(f"--data {name} is a file of an unknown type; pass a folder or an .npz file")
    if Path(name).name != name:
        return MicronetError(f"the data folder {name} does not exist; pass its current path with --data")
    return unknown("data set", name, [*registry.DATA, "a folder", "a file.npz", "pkg.mod:factory"])
