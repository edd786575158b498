"""What was done to a model."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageRecord:
    """One stage that a model went through, JSON values only.

    Attributes:
        stage: The stage's name.
        config: Its settings.
        result: The structure that came of it, enough to rebuild the network without data.
    """

    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)
