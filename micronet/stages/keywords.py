"""Options spelled as keywords of the Python API or as keys of a recipe, in errors and documentation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

from micronet import registry
from micronet.core.config import alternatives, options
from micronet.data.spec import NoDataError
from micronet.errors import MicronetError
from micronet.stages.stage import Stage

_WORDS = ("binary", "ternary", "none")  # values that are no choices of a Literal
# A command line, which stays one, such as "micronet import --data" or "quantize FLOAT.onnx --mode ptq"; or an option.
_COMMANDS = "|".join(sorted(registry.COMMANDS, key=len, reverse=True))
_LINE = rf"(?<![\w/.-])(?:{_COMMANDS})(?: [A-Z]\S*| \S*\w\.\w+| --[a-z][a-z-]*(?: (?!or |and |with )[\w./:-]*\w)?)+"
_OPTION = re.compile(rf"{_LINE}|(?<![\w/.-])((?:add|use|pass|or|with) )?--([a-z][a-z0-9-]*)(?: ([\w./:-]*\w))?")


@contextmanager
def spell_as_keywords(stage: type[Stage], *, recipe: bool = False) -> Iterator[None]:
    """Spell the options of a stage's errors in this context as ``as_keywords`` does."""
    try:
        yield
    except MicronetError as error:
        error.args = (as_keywords(str(error), stage, recipe=recipe),)
        raise


@contextmanager
def offer_example(*, offered: bool) -> Iterator[None]:
    """Name an example input, which only the Python API takes, in errors of this context that miss a data set."""
    try:
        yield
    except NoDataError as error:
        if offered:
            error.args = (f"{error}, or pass an example input",)
        raise


def as_keywords(text: str, stage: type[Stage], *, recipe: bool = False) -> str:
    """Return a text with a stage's options as keywords: ``--mode ptq`` -> ``mode="ptq"``; command lines stay.

    ``recipe``: as keys of a recipe, ``mode = "ptq"``; options that recipes do not take stay as they are.
    """
    known = {option.name: option for option in options(stage)}
    equals, true = (" = ", "true") if recipe else ("=", "True")

    def spelled(found: re.Match[str]) -> str:
        if found[2] is None:  # a command line
            return found[0]
        verb, name, value = found[1] or "", found[2].replace("-", "_"), found[3] or ""
        if recipe and (name not in known or known[name].about["run_only"]):
            return found[0]
        kinds = alternatives(known[name].field.type) if name in known else ()
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if bool in kinds and verb:
            name = f"{name}{equals}{true}"
        elif kinds and re.fullmatch(r"[\d.]+|[A-Z]+", value):
            return f"{verb}{name}{equals}{value}"
        elif kinds and (value in choices or value in _WORDS or re.search(r"\w:\w", value)):
            return f'{verb}{name}{equals}"{value}"'
        elif verb == "with " and found.string[: found.start()].endswith(("one ", "it ", "path ")):
            return f"with {name}{equals}…"  # "specify one with --data"
        return f"{verb}{name} {value}".rstrip()

    return _OPTION.sub(spelled, text)
