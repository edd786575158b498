"""What was done to a model, in order, and which stage may follow which."""

from dataclasses import asdict, dataclass, field
from typing import Any

from micronet.errors import MicronetError


@dataclass(frozen=True)
class StageRecord:
    """One stage that a model went through, JSON values only.

    ``config`` holds what was asked for; ``result`` the structure that came of it, enough to rebuild it without data.
    """

    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)


BEGINNINGS = ("train", "import")

_PRUNE_FIRST = "prune first, then quantize: run it on the float artifact"
_UNFUSED = "take the artifact from before bn-fuse"
# (the stage asked for, a stage already in the history) -> why not, and what to type instead.
FORBIDDEN = {
    ("sparse-train", "quantize"): _PRUNE_FIRST,
    ("sparse-train", "bn-fuse"): _UNFUSED,
    ("prune", "quantize"): _PRUNE_FIRST,
    ("prune", "bn-fuse"): _UNFUSED,
    ("finetune", "bn-fuse"): _UNFUSED,
    ("quantize", "quantize"): "it is quantized already: go on with finetune, or quantize the float artifact again",
    ("bn-fuse", "bn-fuse"): "its batch normalisations are folded already: go on with export-onnx",
}


def check_order(history: list[StageRecord], stage: str) -> None:
    """Raise MicronetError where ``stage`` may not follow ``history``; the message says what to run instead."""
    if stage in BEGINNINGS and history:
        raise MicronetError(f"{stage} begins a history; this artifact already went through {names(history)}")
    for record in history:
        if (stage, record.stage) in FORBIDDEN:
            raise MicronetError(f"{stage} cannot follow {record.stage}: {FORBIDDEN[stage, record.stage]}")


def names(history: list[StageRecord]) -> str:
    """Return the stages in one line: ``train -> quantize -> bn-fuse``."""
    return " -> ".join(record.stage for record in history)
