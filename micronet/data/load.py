"""Loading a data set by the name that the user gives to ``--data``."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

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
        like: The spec of the network that the data are for; its preprocessing overrides the data's.
    """
    like = like or DataSpec()
    place = name or like.name
    if place is None:
        raise MicronetError("the file does not record a data set; name one with --data (and --image-size if needed)")
    if name is None and ":" in place and not Path(place).exists():  # a file must not choose code to run
        raise MicronetError(
            f"the recorded data come from code, {place}, which runs only if you name it: add --data {place}"
        )
    size = image_size or like.image_size
    source = _source(place)(size)
    if like.classes is not None and like.classes != source.classes:
        raise MicronetError(
            f"the network was trained on {_count(like.classes)}, but {place} has {_count(source.classes)}; "
            "use data with the same classes, or train a network on these"
        )
    spec = DataSpec(
        name=str(Path(place).resolve()) if Path(place).exists() else place,
        channels=like.channels,
        image_size=size,
        mean=like.mean,
        std=like.std,
        limit=limit or (like.limit if name is None else None),
        seed=like.seed,
    )
    return Dataset(source, spec)


def _source(name: str) -> Callable[[int | None], DataSource]:
    """Return the function that opens the named source with an image size."""
    path = Path(name)
    if name in registry.DATA:
        opener: Callable[[int | None], DataSource] = registry.resolve(registry.DATA, name, "data set")
        return opener
    if path.is_dir():
        return lambda size: open_folder(path, size)
    if path.suffix == ".npz":
        return lambda size: open_arrays(_npz(path), size)
    if ":" in name:
        return lambda size: open_arrays(_call(name), size)
    raise unknown("data set", name, [*registry.DATA, "a folder", "a file.npz", "pkg.mod:factory"])


def _npz(path: Path) -> Mapping[str, Any]:
    import zipfile
    import zlib

    import numpy as np

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
