"""The exceptions that the command line shows as one line instead of a traceback."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

MAX_NAMES = 16  # in one message
# What a terminal would obey, or a reader not see: control characters, and those that turn the direction of writing.
_CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFFFE, 0xFFFF)
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}


class MicronetError(Exception):
    """A mistake that the user can fix; the message says what was got, what is allowed and what to do next."""

    exit_code = 2
    label = "error"


class StoppedError(MicronetError):
    """The time limit has passed; the work so far is saved."""

    exit_code = 3
    label = "stopped"


class FailedError(MicronetError):
    """A failure without a wrong input: a training diverged, a disk is full, an export does not agree."""

    exit_code = 1


# What a user or the system can cause; anything else is a bug and shows its traceback.
USER_ERRORS = (MicronetError, OSError, MemoryError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an exception that means too little memory.

    torch's allocator on the CPU raises RuntimeError, that on a GPU its own OutOfMemoryError.
    """
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain_code_error(error: BaseException) -> str:
    """Return what the user's code raised, and what to do about it: install what is missing, or fix the code."""
    cure = "install what is missing" if isinstance(error, ModuleNotFoundError) else "fix the code"
    return f"({type(error).__name__}: {first_line(error)}); {cure}"


def visible(text: str, keep: str = "") -> str:
    """Escape control characters, except those in ``keep``, in text that comes from a file or from its name."""
    escapes = {code: shown for code, shown in _ESCAPES.items() if chr(code) not in keep}
    return text.translate(escapes).encode("utf-8", "backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 error``, ``2 classes``, ``1,024 entries``."""
    if number != 1:
        noun = noun[:-1] + "ies" if noun.endswith("ry") else noun + ("es" if noun.endswith("ss") else "s")
    return f"{number:,} {noun}"


def unknown(noun: str, got: str, allowed: Iterable[str]) -> MicronetError:
    """Return the error for an unknown name; it lists each allowed name once, most similar first."""
    ranked = sorted(dict.fromkeys(allowed), key=lambda name: -SequenceMatcher(None, got.lower(), name.lower()).ratio())
    more = f", … ({len(ranked)} in all)" if len(ranked) > MAX_NAMES else ""
    return MicronetError(f"unknown {noun} {got!r}; allowed: {', '.join(ranked[:MAX_NAMES])}{more}")


def listed(names: Sequence[str], most: int) -> str:
    """Return names for a message: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def either(names: Sequence[str]) -> str:
    """Return names to choose from: ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names with the same reason together: reason -> names, in order."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return names
