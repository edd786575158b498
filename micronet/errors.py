"""The only exceptions that the command line turns into one line instead of a traceback."""

from collections.abc import Iterable
from difflib import SequenceMatcher

MOST_NAMES = 16  # in one message


class MicronetError(Exception):
    """A mistake the user can mend. The message says what was got, what is allowed and what to type next."""

    exit_code = 2
    label = "error"


class StoppedError(MicronetError):
    """The time that the user allowed is over; what was done is kept."""

    exit_code = 3
    label = "stopped"


class FailedError(MicronetError):
    """A failure that was nobody's typing mistake: a diverged training, a full disk, an export that does not agree."""

    exit_code = 1


# What a user can cause: mistakes, failures, what the system refuses.
USER_ERRORS = (MicronetError, OSError, MemoryError)


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown(noun: str, got: str, allowed: Iterable[str]) -> MicronetError:
    """Build the error for a name outside a set: the allowed names, the one nearest to ``got`` first."""
    ranked = sorted(allowed, key=lambda name: -SequenceMatcher(None, got.lower(), name.lower()).ratio())
    more = f", … ({len(ranked)} in all)" if len(ranked) > MOST_NAMES else ""
    return MicronetError(f"unknown {noun} {got!r}; allowed: {', '.join(ranked[:MOST_NAMES])}{more}")
