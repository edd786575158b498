"""How to run a network; no torch here, so that ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal

from micronet.core.config import check_range, check_values, setting


@dataclass(frozen=True)
class CodeOptions:
    """Artifacts whose network is the user's own code."""

    model: str | None = setting(None, "Names the code again of an artifact made from path/to/file.py:factory.")
    trust_code: bool = setting(False, "Run the code recorded in the artifact.")


@dataclass(frozen=True)
class RuntimeOptions(CodeOptions):
    """How to run it.

    ``exact`` arithmetic costs about a third of ONNX Runtime's int8 speed on x86 processors without VNNI, whose fast
    kernels saturate in their 16-bit intermediate sums; with VNNI it costs nothing.
    """

    device: str | None = setting(None, "cpu, cuda or cuda:N, for torch; default: the best present.")
    threads: int | None = setting(None, "Threads a network runs on; default: OMP_NUM_THREADS, or all cores.")
    arithmetic: Literal["exact", "fast"] = setting(
        "exact", "ONNX Runtime's int8 kernels: exact, or fast and saturating on x86 without VNNI."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.threads is not None:
            check_range(self, "threads", 1)
