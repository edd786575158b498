"""The settings of running a network. No torch here, so ``--help`` stays fast."""

from dataclasses import dataclass
from typing import Literal

from micronet.core.config import Settings, setting


@dataclass(frozen=True)
class CodeOptions(Settings):
    """Your own network code."""

    model: str | None = setting(
        None,
        "path/to/file.py:factory, your copy of the code that built the network; passing it allows that code to run.",
    )
    trust_code: bool = setting(False, "Allow code stored in the artifact to run.")


@dataclass(frozen=True)
class RuntimeOptions(CodeOptions):
    """Runtime.

    On x86 processors without VNNI, ``exact`` arithmetic costs about a third of ONNX Runtime's int8 speed, because its
    fast kernels saturate in 16-bit intermediate sums. With VNNI it costs nothing.
    """

    device: str | None = setting(
        None, "Device for torch: cpu, cuda or cuda:N; default: cuda if available, otherwise cpu.", basic=True
    )
    threads: int | None = setting(
        None, "Number of CPU threads; default: OMP_NUM_THREADS, or one per core.", low=1, high=1024, basic=True
    )
    arithmetic: Literal["exact", "fast"] = setting(
        "exact",
        "ONNX Runtime's int8 arithmetic: exact, or fast but with sums that can saturate on x86 CPUs without VNNI.",
    )
