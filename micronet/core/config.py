"""Settings, each declared once.

A config is a dataclass whose fields are made by ``setting``. From that one declaration follow the command-line option,
the recipe key, the API keyword, the check of its value, the entry in an artifact's history and the JSON Schema.
A config may hold other configs (``group``); their settings then appear beside its own, under one flat set of names.
"""

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Union, Unpack, get_args, get_origin

from micronet.errors import MicronetError, unknown

C = TypeVar("C")
_WORDS: dict[Any, str]
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", list: "a list"}


class About(TypedDict, total=False):
    """What ``setting`` can declare besides the default, the help and the short option."""

    low: float  # the smallest number allowed
    high: float  # the largest number allowed
    basic: bool  # --help shows it before the advanced options
    metavar: str | None  # the placeholder of its value in --help
    argument: bool  # the command line takes it by position
    kinds: tuple[str, ...]  # the file suffixes it takes, if it names a file
    run_only: bool  # it says how a command runs, not what it computes; recipes do not take it
    api: bool  # the Python API takes it
    option: str | None  # its spelling on the command line, if it is not "--" and the name
    names: str | None  # the kind of names, as in `micronet list KIND`, that shells complete
    place: str | None  # "file": a file to write, "cache": one to read or write; checked before any work


_UNDECLARED: About = {
    "low": -math.inf, "high": math.inf, "basic": False, "metavar": None, "argument": False, "kinds": (),
    "run_only": False, "api": True, "option": None, "names": None, "place": None,
}  # fmt: skip


def setting(default: Any = MISSING, help: str = "", short: str | None = None, **about: Unpack[About]) -> Any:
    """Declare one setting.

    Args:
        default: Its default value; without one, the setting is required.
        help: One or two sentences for ``--help``, the API's documentation and the schema.
        short: A one-letter option, for example ``-o``.
        about: See ``About``.
    """
    return field(default=default, metadata={"help": help, "short": short, **_UNDECLARED, **about})


def group(config: Any) -> Any:
    """Declare a config inside a config: a class, or an instance that holds other defaults."""
    default = config() if isinstance(config, type) else config
    return field(default_factory=lambda: default, metadata={"group": default})


def flag(name: str) -> str:
    """Spell a field's name as the command line does: ``w_bits`` -> ``--w-bits``."""
    return "--" + name.replace("_", "-")


class Settings:
    """Base of the config dataclasses: checks every value against its declaration."""

    def __post_init__(self) -> None:
        check_values(self)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # every subclass is a dataclass


class Option(NamedTuple):
    """One setting of a config, found among its groups."""

    name: str
    field: Field[Any]
    about: Mapping[str, Any]  # what ``setting`` declared
    default: Any
    title: str = ""  # what its group is about

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING


def options(config: type) -> Iterator[Option]:
    """Yield every setting of a config class and of its groups, in the order declared."""
    for item in fields(config):
        inner = item.metadata.get("group")
        if inner is None:
            yield Option(item.name, item, item.metadata, item.default)
            continue
        title = (inner.__doc__ or "").splitlines()[0].rstrip(".")
        for sub in fields(inner):
            yield Option(sub.name, sub, sub.metadata, getattr(inner, sub.name), title)


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """Make a config from a flat mapping of its settings; those left out take their defaults.

    Raises:
        MicronetError: A name is unknown, a value is not allowed, or a required setting is missing.
    """
    known = {option.name: option for option in options(config)}
    for name in values:
        if name not in known:
            raise unknown("setting", name, known)
    if missing := [option for option in known.values() if option.required and option.name not in values]:
        raise MicronetError(f"{_spelled(missing[0].field)} is required: {missing[0].about['help']}")
    made: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]  # a dataclass
        inner = item.metadata.get("group")
        if inner is not None:
            own = {sub.name: values[sub.name] for sub in fields(inner) if sub.name in values}
            made[item.name] = replace(inner, **own)
        elif item.name in values:
            made[item.name] = values[item.name]
    whole = config(**made)
    check_values(whole)
    return whole


def flatten(config: Any) -> dict[str, Any]:
    """Return a config's settings and those of its groups as one flat mapping."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        flat |= flatten(value) if is_dataclass(value) else {item.name: value}
    return flat


def changed(config: Any) -> dict[str, Any]:
    """Return the settings of a config that differ from their defaults."""
    defaults = {option.name: option.default for option in options(type(config))}
    return {name: value for name, value in flatten(config).items() if value != defaults[name]}


def check_values(config: Any) -> None:
    """Raise MicronetError if a value of a config is not of its field's type, not a choice or out of its bounds."""
    for item in fields(config):
        if "help" in item.metadata:
            _check_value(item, getattr(config, item.name))


def _check_value(item: Field[Any], value: Any) -> None:
    if not accepts(item.type, value):
        kinds = alternatives(item.type)
        if choices := [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]:
            raise unknown(f"value for {_spelled(item)}:", str(value), choices)
        raise MicronetError(f"{_spelled(item)} is {value!r}; expected {describe(item.type)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = item.metadata["low"], item.metadata["high"]
        large = abs(value) > sys.float_info.max  # integers can be larger than any float
        if large or not (math.isfinite(value) and low <= value <= high):
            shown = f"{(math.inf if value > 0 else -math.inf) if large else value:g}"
            raise MicronetError(f"{_spelled(item)} is {shown}; allowed: {_interval(low, high)}")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)  # Union: of a Literal


def accepts(kind: Any, value: Any) -> bool:
    """Return True if a value is of a type: the type of a setting, or of a field of a JSON object."""
    if len(kinds := alternatives(kind)) > 1:
        return any(accepts(one, value) for one in kinds)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(accepts(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is dict:
        names, items = get_args(kind)
        return isinstance(value, dict) and all(accepts(names, k) and accepts(items, v) for k, v in value.items())
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def describe(kind: Any) -> str:
    """Describe a setting's type in words: ``a whole number or text``."""
    words = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            words += [repr(choice) for choice in get_args(one)]
        elif one is not NoneType:
            words.append(_WORDS.get(get_origin(one) or one, "another value"))
    return " or ".join(words)


def matching(config: Any, option: str, names: Collection[str]) -> set[str]:
    """Return the layers that a setting's comma-separated globs match; raise MicronetError if one matches none."""
    found: set[str] = set()
    for pattern in filter(None, map(str.strip, (getattr(config, option) or "").split(","))):
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise MicronetError(f"{flag(option)}: {unknown('layer', pattern, names)}")
        found |= matched
    return found


def json_schema(config: type) -> dict[str, Any]:
    """Return the JSON Schema of a config's settings as an object, for editors and other tools."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {}}
    for option in options(config):
        if option.about["run_only"]:
            continue
        about = {"description": option.about["help"], **_schema_of(option.field.type)}
        for name, key in (("low", "minimum"), ("high", "maximum")):
            if math.isfinite(option.about[name]):
                about[key] = option.about[name]
        if option.default is not MISSING and option.default is not None:
            about["default"] = str(option.default) if isinstance(option.default, Path) else option.default
        schema["properties"][option.name] = about
    return schema


def _schema_of(kind: Any) -> dict[str, Any]:
    kinds = [one for one in alternatives(kind) if one is not NoneType]
    if len(kinds) > 1:
        return {"anyOf": [_schema_of(one) for one in kinds]}
    if get_origin(kinds[0]) is Literal:
        return {"enum": list(get_args(kinds[0]))}
    if get_origin(kinds[0]) is list:
        return {"type": "array", "items": _schema_of(get_args(kinds[0])[0])}
    return {"type": {bool: "boolean", int: "integer", float: "number"}.get(kinds[0], "string")}


def spell(config: type, values: Mapping[str, Any]) -> list[str]:
    """Return the command-line words that say what a mapping of settings says."""
    words: list[str] = []
    known = {option.name: option for option in options(config)}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if known[name].about["argument"]:
            words += map(str, items)
        elif value is True:
            words.append(_spelled(known[name].field))
        elif value is not False and value is not None:
            words += [_spelled(known[name].field), str(value)]
    return words


def _spelled(item: Field[Any]) -> str:
    if item.metadata["option"]:
        return str(item.metadata["option"])
    return item.metadata["metavar"] or item.name.upper() if item.metadata["argument"] else flag(item.name)


def _interval(low: float, high: float) -> str:
    if high == math.inf:
        return "any finite number" if low == -math.inf else f"{low:g} or more"
    return f"up to {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
