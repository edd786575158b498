"""Packed files as the networks that ``evaluate``, ``compare`` and ``predict`` open."""

from pathlib import Path

from micronet.core.machine import usable_threads
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.packed.predictor import PackedNetwork


class PackedPredictor(PackedNetwork):
    """A packed network with what is known of it: its data, stages and number of weights."""

    runtime = "packed"

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        if not path.exists():
            raise MicronetError(f"{path} does not exist; create it with micronet pack")
        if options.device not in (None, "cpu"):
            raise MicronetError(f"{path}: packed networks only run on the CPU; drop --device {options.device}")
        super().__init__(path, options.threads or usable_threads())
        about = self.program.about
        self.data = DataSpec.from_json(about["data"]) if about.get("data") else None
        self.stages = [str(stage) for stage in about.get("stages") or []]
        self.params = self.program.weights

    def macs(self, *shapes: tuple[int, ...]) -> int:
        """Return the multiply-accumulates per image; a packed network takes only one image shape."""
        return super().macs()
