"""A packed program ready for the interpreter: its instruction table, constants and workspace."""

import numpy as np

from micronet.errors import MicronetError
from micronet.packed.program import Program
from micronet.runtimes.packed.constants import ConstantPool
from micronet.runtimes.packed.encoding import encode
from micronet.runtimes.packed.feature_maps import CACHE_LINE, Workspace, aligned_zeros
from micronet.runtimes.packed.kernels.cpu import BLOCK_PIXELS, UINT8
from micronet.runtimes.packed.kernels.instructions import INSTRUCTION
from micronet.runtimes.packed.lowering import Lowering

MAX_IMAGE_BYTES = 1 << 34


class ExecutionPlan:
    """A program's instructions and constants. Raises UnsupportedProgram if the kernels do not support the program.

    calls: the instructions before encoding. image_bytes: size of the workspace per image. largest_map: bytes of the
    largest feature map. flat: the scores are a flattened feature map.
    """

    def __init__(self, program: Program) -> None:
        lowering = Lowering(program)
        self.calls, self.flat = lowering.calls, lowering.result.flat
        self._images, self._scores, self._maps = lowering.images, lowering.scores, lowering.maps
        self.image_bytes = 0
        for each in self._maps:
            each.buffer, self.image_bytes = self.image_bytes, self.image_bytes + each.image_bytes
        constants: ConstantPool = lowering.constants
        self.instructions = np.array([encode(call, constants) for call in self.calls], INSTRUCTION)
        self.constants = constants.arrays()
        if self.image_bytes > MAX_IMAGE_BYTES:
            raise MicronetError(
                f"the packed network needs {self.image_bytes >> 30} GiB of memory per image, more than the limit of "
                f"{MAX_IMAGE_BYTES >> 30} GiB; the file is damaged, or the network is too large"
            )
        self.largest_map = max(each.image_bytes for each in self._maps)

    def workspace(self, images: int) -> Workspace:
        """Return memory for the feature maps of a batch, with their padding filled in."""
        x_steps = [call.x.pixel_bytes * call.fields.get("stride_x", 1) for call in self.calls]
        overrun = BLOCK_PIXELS * max(x_steps) + CACHE_LINE  # the last block of pixels reads beyond its map
        memory = aligned_zeros(-(-(self.image_bytes * images + overrun) // CACHE_LINE) * CACHE_LINE, np.uint8)
        for each in self._maps:
            if each.dtype == UINT8 and each.zero_point:
                memory[each.buffer * images : (each.buffer + each.image_bytes) * images] = each.zero_point
        return Workspace(memory, self._images.view_nchw(memory, images), self._scores.view_nhwc(memory, images))
