"""Config fields with a help text: one dataclass gives the flag, the recipe key, the JSON key and the check."""

import math
from collections.abc import Collection
from dataclasses import asdict, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from micronet.errors import MicronetError, unknown

_NONE = type(None)
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    float | None: ((int, float, _NONE), "a number"),
    str | None: ((str, _NONE), "text, several by commas"),
}


def setting(default: Any, help: str, short: str | None = None) -> Any:
    """Declare a dataclass field with the help text, and perhaps the one-letter flag, of the command line."""
    return field(default=default, metadata={"help": help, "short": short})


def flag(name: str) -> str:
    """Spell a field's name as the command line does: ``w_bits`` -> ``--w-bits``."""
    return "--" + name.replace("_", "-")


class Settings:
    """Base of config dataclasses."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # every subclass is a dataclass


def check_values(config: Any) -> None:
    """Raise MicronetError where a number, text or a ``Literal`` field of a dataclass holds what it cannot be."""
    for name, item in type(config).__dataclass_fields__.items():
        value = getattr(config, name)
        types, expected = _KINDS.get(item.type, ((object,), ""))
        if expected and (isinstance(value, bool) or not isinstance(value, types)):
            raise MicronetError(f"{flag(name)} is {value!r}; expected {expected}")
        if get_origin(item.type) is Literal and value not in get_args(item.type):
            raise unknown(f"value for {flag(name)}:", str(value), map(str, get_args(item.type)))


def check_range(config: Any, name: str, low: float, high: float = math.inf) -> None:
    """Raise MicronetError where a number of a dataclass is not finite or lies outside [low, high]."""
    value = getattr(config, name)
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        raise MicronetError(f"{flag(name)} is {value:g}; allowed: {allowed}")


def matching(config: Any, option: str, names: Collection[str]) -> set[str]:
    """Return the layers that an option's names and globs mean. Raises MicronetError where one of them means none."""
    found: set[str] = set()
    for pattern in filter(None, map(str.strip, (getattr(config, option) or "").split(","))):
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise MicronetError(f"{flag(option)}: {unknown('layer', pattern, names)}")
        found |= matched
    return found
