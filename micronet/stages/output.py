"""Writing results: the path is checked before the work, the file is written whole after it, by rank 0 only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from micronet.core.config import flatten, options
from micronet.core.files import check_cache_path, check_output_path, check_writable
from micronet.errors import MicronetError


def check_output(path: Path, suffix: str, *, force: bool, resume: bool) -> None:
    """Raise MicronetError if a result cannot be written to a path, or one is there already."""
    from micronet.training import distributed

    def check() -> None:
        if resume and path.exists() and not force:
            raise MicronetError(f"{path} is finished, so there is nothing to resume; --force starts again")
        check_output_path(path, force, suffix)

    distributed.from_rank_zero(check)


def check_places(config: Any) -> None:
    """Raise MicronetError if a cache or another file that the config names cannot be written."""
    values = flatten(config)
    for option in options(type(config)):
        if option.about["place"] == "cache":
            check_cache_path(values[option.name])
        elif option.about["place"] == "file":
            check_writable(values[option.name])


def finish(write: Callable[[], None], trained: Path | None) -> None:
    """Write a result; then remove the checkpoint of a training, which could have recreated it.

    Args:
        write: Writes the result.
        trained: The output of the training, or None if the stage did not train.
    """
    from micronet.training import distributed
    from micronet.training.checkpoint import Checkpoint

    def work() -> None:
        write()
        if trained is not None:
            Checkpoint.beside(trained, {}).remove()

    distributed.from_rank_zero(work)
