"""Run ncnn networks on the CPU, one image at a time."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.core.files import temporary_folder
from micronet.core.machine import usable_threads
from micronet.core.packages import load_package
from micronet.data.spec import DataSpec
from micronet.errors import FailedError, MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.ncnn.files import BIN, PARAM, NcnnFile, read
from micronet.runtimes.ncnn.lowering import INPUT

MISSING = "ncnn networks need ncnn to run; run pip install ncnn"
# By default, ncnn computes floats in float16 or bfloat16 if the processor has it: equality with torch needs float32.
EXACT = ("use_vulkan_compute", "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")


class NcnnPredictor:
    """A network run by ncnn: layers with int8 weights in int8, all others in float32."""

    runtime = "ncnn"

    def __init__(self, folder: Path, note: dict[str, Any], options: RuntimeOptions) -> None:
        if options.device not in (None, "cpu"):
            raise MicronetError(f"{folder}: ncnn networks only run on the CPU; drop --device {options.device}")
        library = load_library()
        self.file: NcnnFile = read(folder, note)
        about = note["about"]
        self.data = DataSpec.from_json(about["data"]) if about.get("data") else None
        self.stages = [str(stage) for stage in about.get("stages") or []]
        self.params = self.file.weights
        self.outputs: list[str] = note["outputs"]
        self._library, self._net = library, library.Net()
        self._net.opt.num_threads = options.threads or usable_threads()
        for name in EXACT:
            setattr(self._net.opt, name, False)
        if not self._load():
            raise FailedError(f"{folder}: ncnn {library.__version__} cannot load it; run pip install -U ncnn")

    def _load(self) -> bool:
        """Give ncnn what was checked, not the files, which may have changed since; return True if it accepts it.

        It goes through a private folder: load_model_mem of the Python wheel frees the bytes that its network reads.
        """
        with temporary_folder() as folder:
            param, weights = folder / PARAM, folder / BIN
            param.write_bytes(self.file.param)
            weights.write_bytes(self.file.bin)
            return not (self._net.load_param(str(param)) or self._net.load_model(str(weights)))

    def __call__(self, images: NDArray[np.float32]) -> Any:
        """Compute the network's outputs for images.

        Args:
            images: (N, C, H, W), floating point, normalized as in training.

        Returns:
            Scores (N, K), float32, or feature maps (N, C, H, W); a list of them if the network has several outputs.

        Raises:
            MicronetError: The images have another size or are not floats.
        """
        shape = self.file.blobs[INPUT].shape
        if images.dtype.kind != "f" or images.ndim != 4 or images.shape[1:] != shape:
            raise MicronetError(
                f"the ncnn network expects float images of shape (N, {', '.join(map(str, shape))}), but got "
                f"{images.dtype} {images.shape}"
            )
        found = [self.blobs(image, self.outputs) for image in images]
        empty = [np.zeros((0, *self.file.blobs[name].shape), np.float32) for name in self.outputs]
        outputs = [np.stack(parts) for parts in zip(*found, strict=True)] if found else empty
        return outputs if len(outputs) > 1 else outputs[0]

    def blobs(self, image: NDArray[np.float32], names: list[str]) -> list[NDArray[Any]]:
        """Return the named blobs, float32 or int8, for one image (C, H, W)."""
        extractor = self._net.create_extractor()
        extractor.set_light_mode(names == self.outputs)  # it frees what later layers do not need
        pixels = np.ascontiguousarray(image, np.float32)  # kept until it is copied: ncnn does not count its references
        extractor.input(INPUT, self._library.Mat(pixels).clone())
        found = []
        for name in names:
            failed, blob = extractor.extract(name)
            if failed:
                raise FailedError(f"ncnn could not compute {name} (code {failed})")
            found.append(np.array(blob))
        return found

    def macs(self, *shapes: tuple[int, ...]) -> int:
        """Return the multiply-accumulates per image; an ncnn network takes only one image shape."""
        return self.file.macs

    def layers(self) -> dict[str, str]:
        """Return what each convolution and linear layer computes in: "int8", or "float: " and why."""
        return dict(self.file.note["layers"])


def load_library() -> Any:
    """Return ncnn's module; raise MicronetError with what to install if it is missing."""
    return load_package("ncnn", "ncnn", MISSING)
