"""Mistakes in a command line's form, which Typer finds, as one line in micronet's words."""

import re
from itertools import pairwise
from typing import Any

from micronet import registry
from micronet.errors import MicronetError, unknown

_NUMBERS = (("int", "an integer"), ("number|float", "a number"))
# What Typer says -> what micronet says; Typer's other messages stay as they are.
_PHRASES = (
    (r"No such option:? '?(-[\w-]*)'?\.?", r"unknown option \1"),
    (r"'(-[\w-]*)'(?=, |\?)", r"\1"),
    (r" \(?(?:Possible options:|Did you mean(?: one of:)?) (.*?)\??\)?$", r" (did you mean \1?)"),  # of four versions
    (r"Missing (?:argument|option|parameter):? '(.*)'.*", r"\1 is required"),
    (r"Got unexpected extra argument.*? \((.*)\)", r"unexpected argument: \1"),
    (r"Option '(.*)' requires an argument\.", r"\1 needs a value"),
    (r"Invalid value for '(.*?)'.*?: (?:Value error, )?(.*)", r"invalid value for \1: \2"),
)


def usage_error(error: Any, arguments: list[str]) -> MicronetError:
    """Return the error for a command line that Typer refuses.

    Args:
        error: Typer's ``UsageError``.
        arguments: The words after ``micronet``.
    """
    command = arguments[0] if arguments and arguments[0] in registry.COMMANDS else ""
    return MicronetError(f"{_say(error.format_message(), arguments)}; see micronet {command} --help".replace("  ", " "))


def _say(message: str, arguments: list[str]) -> str:
    if found := re.match(r"No such command '(.*?)'", message):
        return str(unknown("command", found[1], registry.COMMANDS))
    if found := re.match(r"Invalid value for '(.*?)'.*?: (.*)", message):
        option, why = found.groups()
        if choice := re.search(r"'(.*)' is not one of (.*?)\.?$", why):
            return str(unknown(f"value for {option}:", choice[1], choice[2].replace("'", "").split(", ")))
        words = [word for argument in arguments for word in argument.split("=", 1)]
        given = next((value for name, value in pairwise(words) if name == option), None)
        for kind, expected in _NUMBERS:
            if given is not None and re.search(kind, why):
                return f"{option} is {given!r}; expected {expected}"
    for pattern, replacement in _PHRASES:
        message = re.sub(pattern, replacement, message)
    return message.rstrip(".")
