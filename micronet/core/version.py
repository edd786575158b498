"""The version of micronet that runs."""

from importlib.metadata import PackageNotFoundError, metadata

DISTRIBUTION = "micronet-compress"  # on PyPI, micronet is the project of 2021


def version() -> str:
    """Return the installed version, or 0 in a tree that is not installed."""
    try:
        return metadata(DISTRIBUTION)["Version"]
    except PackageNotFoundError:
        return "0"
