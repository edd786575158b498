"""Asking in a terminal what the options of ``init`` did not answer."""

import sys
from typing import Any

from micronet.cli import console
from micronet.core.config import flag, flatten
from micronet.errors import MicronetError


def answered(stage: Any) -> Any:
    """Return a stage with the answers to its questions; each is asked again until it is valid.

    Raises MicronetError if there is no terminal to ask in, or its input ends.
    """
    from micronet.recipe.init import QUESTIONS

    if stage.yes or not stage.unanswered():
        return stage
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        options = ", ".join(map(flag, stage.unanswered()))
        raise MicronetError(f"init asks its questions in a terminal, but there is none; give {options}, or add --yes")
    for name in stage.unanswered():
        default = stage.default(name)
        shown = stage.recorded_data() if default is None else default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        while True:
            console.err.print(f"{QUESTIONS[name]} [{console.plain(str(shown))}]", markup=False)
            try:
                console.err.print("> ", end="")
                text = input().strip()
            except EOFError:
                raise MicronetError("the input ended before the last answer; nothing was written") from None
            try:
                value = _number(name, text) if name == "max_drop" and text else text or default
                stage = stage.configure({**flatten(stage), name: value})
                break
            except MicronetError as error:
                console.print_error(str(error))
    return stage


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MicronetError(f"{flag(name)} is {text!r}; expected a number") from None
