"""Packages that are only needed for some things, and may not be installed."""

from importlib import import_module
from typing import Any

from micronet.errors import MicronetError, first_line


def load_package(name: str, title: str, missing: str) -> Any:
    """Return a package's module.

    Raises MicronetError, with the text ``missing`` if it is not installed, and otherwise with the reason.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MicronetError(missing) from error
    except ImportError as error:  # a library that it needs is missing, for example
        raise MicronetError(f"{title} cannot be imported ({first_line(error)})") from error
