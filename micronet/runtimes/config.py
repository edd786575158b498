"""The settings of running a network. No torch here, so ``--help`` stays fast."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from micronet import registry
from micronet.core.config import Settings, setting
from micronet.errors import MicronetError, unknown

DEFAULT_RUNTIME = "onnxruntime"


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

    runtime: str | None = setting(
        None,
        "Runtime for .onnx files: onnxruntime, or openvino if that package is installed; compare takes both, separated "
        "by a comma. Default: onnxruntime.",
        basic=True,
        names="runtimes",
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.runtimes:
            if name not in registry.ONNX_RUNTIMES:
                raise unknown("runtime", name, registry.ONNX_RUNTIMES)

    @property
    def runtimes(self) -> list[str]:
        """The runtimes for .onnx files, at least one."""
        return list(dict.fromkeys(name.strip() for name in (self.runtime or DEFAULT_RUNTIME).split(",")))

    def check_files(self, files: Iterable[Path], *, several: bool = False) -> None:
        """Raise MicronetError if a runtime is chosen but no file is an .onnx file, or several unless ``several``."""
        if self.runtime is not None and not any(file.suffix == ".onnx" for file in files):
            raise MicronetError(f"--runtime {self.runtime} only applies to .onnx files; drop it")
        if len(self.runtimes) > 1 and not several:
            raise MicronetError(
                f"--runtime {self.runtime} names {len(self.runtimes)} runtimes; only compare takes several"
            )
