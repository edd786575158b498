"""What was done to a model."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageRecord:
    """One stage that a model went through, JSON values only."""

    stage: str
    config: dict[str, Any] = field(default_factory=dict)  # its settings
    result: dict[str, Any] = field(default_factory=dict)  # the structure, enough to rebuild the network without data

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)
