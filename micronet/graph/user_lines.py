"""The line of the user's code where something happened: neither torch's nor ours."""

import traceback
from pathlib import Path


def user_line(stack: traceback.StackSummary) -> str:
    """Return " at FILE:LINE (code)" for the last line of a stack that is neither torch's nor ours, or ""."""
    own = [frame for frame in stack if not _is_ours(frame.filename)]
    line = f" ({own[-1].line})" if own and own[-1].line else ""  # code recorded in an artifact has no source file
    return f" at {own[-1].filename}:{own[-1].lineno}{line}" if own else ""


def error_line(error: BaseException) -> str:
    """Return where an error was raised, as ``user_line`` does."""
    return user_line(traceback.extract_tb(error.__traceback__))


def _is_ours(filename: str) -> bool:
    others = "/torch/", "/onnxruntime/", "/contextlib.py"
    return any(part in filename for part in others) or filename.startswith(str(Path(__file__).parents[1]))
