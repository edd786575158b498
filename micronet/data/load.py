"""Loading a data set by the name that the user gives to ``--data``."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from micronet import registry
from micronet.data.dataset import Dataset, DataSource, DataSpec
from micronet.data.folder import open_folder
from micronet.data.sources import open_arrays
from micronet.errors import MicronetError, unknown


def load_data(
    name: str | None, *, image_size: int | None = None, limit: int | None = None, like: DataSpec | None = None
) -> Dataset:
    """Open a data set; images are read when they are first used.

    Args:
        name: A built-in data set, a folder, a ``.npz`` file or ``pkg.mod:factory``; None: the name in ``like``.
        image_size: Height and width in pixels; None: as in ``like``, or the images' own.
        limit: The maximum number of training images, and of test images.
        like: The spec of the network that the data set is for; its preprocessing overrides the data set's.
    """
    like = like or DataSpec()
    place = name or like.name
    if place is None:
        raise MicronetError("the file does not record a data set; name one with --data (and --image-size if needed)")
    if name is None and ":" in place and not Path(place).exists():  # a file must not choose code to run
        raise MicronetError(
            f"the recorded data set comes from code, {place}, which runs only if you name it: add --data {place}"
        )
    size = image_size or like.image_size
    source = _open(place, size)
    if like.classes is not None and like.classes != source.classes:
        raise MicronetError(
            f"the network was trained on {_count(like.classes)}, but {place} has {_count(source.classes)}; "
            "use data with the same classes, or train a network on these"
        )
    return Dataset(
        source,
        replace(
            like,
            name=str(Path(place).resolve()) if Path(place).exists() else place,
            image_size=size,
            limit=limit or (like.limit if name is None else None),
        ),
    )


def _open(name: str, image_size: int | None) -> DataSource:
    path = Path(name)
    if name in registry.DATA:
        source: DataSource = registry.load_object(registry.DATA[name])(image_size)
        return source
    if path.is_dir():
        return open_folder(path, image_size)
    if path.suffix == ".npz":
        return open_arrays(_npz(path), image_size)
    if ":" in name:
        return open_arrays(_call(name), image_size)
    raise unknown("data set", name, [*registry.DATA, "a folder", "a file.npz", "pkg.mod:factory"])


def _npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OSError as error:
        raise MicronetError(f"{path} cannot be read ({error.strerror or 'damaged'})") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MicronetError(
            f"{path} is not a valid .npz file of plain arrays: it is damaged or pickled; save it again with numpy.savez"
        ) from error


def _call(name: str) -> Mapping[str, Any]:
    module, _, attribute = name.partition(":")
    try:
        with registry.importable_from(Path.cwd()):
            result = getattr(import_module(module), attribute)()
    except Exception as error:
        raise MicronetError(f"--data {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        raise MicronetError(
            f"--data {name} returned a {type(result).__name__}; expected a dict of arrays like a .npz file's"
        )
    return result


def _count(classes: list[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"
