"""Writing a packed program as a folder of C99 code."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.core.folders import Folder, write_folder
from micronet.errors import MicronetError
from micronet.packed.file_format import to_bytes
from micronet.packed.program import Operation, Program
from micronet.runtimes.c import sources
from micronet.runtimes.c.lowering import Output, lower, normalization, takes_pixels
from micronet.runtimes.c.maps import Call, Map, live_bytes, place_buffers
from micronet.runtimes.c.reference import reference_scores
from micronet.runtimes.c.sizes import CSizes, LayerSize
from micronet.runtimes.c.state import State
from micronet.runtimes.c.tables import define, literal

PROGRAM = "model.packed"  # from which the code can be written again
CODE = ("model.h", "model.c", "kernels.h", "weights.h")
MAX_PATCH = 1 << 26  # bytes of a layer's window
SEED = 0  # of the test image
NORMALIZED = """#ifdef MICRONET_NORMALIZED
/* As micronet_predict, for an image of floats, normalized as in training. */
int micronet_predict_normalized(const float *image, micronet_score *scores);
#endif

"""


def write_c(program: Program, folder: Path) -> CSizes:
    """Write a program as C code that computes the packed runtime's scores bit for bit.

    Args:
        program: a packed network.
        folder: a new folder; it appears whole or not at all.

    Returns:
        What the code needs of flash and RAM.

    Raises:
        MicronetError: if C does not support an operation, or if its layers do not fit together; nothing is written.
    """
    code = c_code(program)
    write_folder(folder, Folder(folder_files(program, code), {"target": "c", "sizes": code.sizes.to_json()}))
    return code.sizes


def folder_files(program: Program, code: "CCode") -> dict[str, bytes]:
    """Return the files of a folder, by name: the code, a test of it, and the packed program."""
    texts = {
        **code.files, "main.c": sources.fill("main.c"), "test_vector.h": _test_vector(program, code.outputs),
        "Makefile": sources.fill("Makefile"),
    }  # fmt: skip
    return {name: text.encode() for name, text in texts.items()} | {PROGRAM: to_bytes(program)}


class CCode(NamedTuple):
    """A network's code: the texts of the files in CODE, its outputs, what it needs, and the calls of its kernels."""

    files: dict[str, str]
    outputs: list[Output]
    sizes: CSizes
    calls: list[Call]


def c_code(program: Program) -> CCode:
    """Return a program's code. Raises MicronetError as ``write_c`` does."""
    try:
        state, outputs = lower(program)
    except (ValueError, ArithmeticError, IndexError, KeyError, TypeError, AssertionError, MemoryError) as error:
        raise MicronetError(
            f"the layers of the packed network do not fit together ({error}); pack the network again"
        ) from error
    arena = place_buffers(state.calls)
    if state.patch_bytes > MAX_PATCH:
        raise MicronetError(
            f"a layer's window takes {state.patch_bytes >> 20} MiB; --target c allows {MAX_PATCH >> 20}"
        )
    sizes = _sizes(state, arena)
    kernels = list(dict.fromkeys(call.kernel for call in state.calls))
    files = {
        "model.h": _header(program, state, outputs, sizes, arena),
        "model.c": _model(state, arena),
        "kernels.h": sources.kernel_code(kernels, state.functions),
        "weights.h": "/* Written by micronet: constants at their true width. */\n" + state.tables.code() + "\n",
    }
    return CCode(files, outputs, sizes, state.calls)


def _sizes(state: State, arena: int) -> CSizes:
    image = Operation("image", [])
    layers = []
    for index, operation in enumerate([image, *state.program.operations], -1):
        used = [live_bytes(state.calls, number) for number, call in enumerate(state.calls) if call.operation == index]
        if used:
            flash = state.tables.layer_bytes.get(index, 0)
            layers.append(LayerSize(index, operation.kind, flash, max(used), operation.name))
    return CSizes(sum(state.tables.layer_bytes.values()), arena + _patch(state), layers)


def _patch(state: State) -> int:
    return -(-state.patch_bytes // 8) * 8


def _header(program: Program, state: State, outputs: list[Output], sizes: CSizes, arena: int) -> str:
    channels, rows, columns = program.shape
    pixels, integer, lines, place = takes_pixels(program), outputs[0].integer, [], 0
    for number, output in enumerate(outputs):
        text = " x ".join(map(str, output.shape))
        lines.append(
            f"#define MICRONET_OUTPUT_{number} {place} /* the first score of {text} (channels, rows, columns) */"
        )
        place += int(np.prod(output.shape))
    scale = f"#define MICRONET_SCORE_SCALE {literal(np.float32(outputs[0].map.scale))}\n"
    return sources.fill(
        "model.h", what=_what(program), ram=sizes.ram, arena=arena, patch=_patch(state), flash=sizes.flash,
        depth="less than 2 KiB",
        scores_text="The scores are integers; times MICRONET_SCORE_SCALE, they are the network's." if integer
        else "The scores are floats.",
        rows=rows, columns=columns, channels=channels, scores=place, outputs=len(outputs),
        output_lines="\n".join(lines), scale_line=scale if integer else "",
        pixel="uint8_t" if pixels else "float",
        pixel_text="0 to 255, as in an image file; the code normalizes it" if pixels
        else "normalized as in training, which the network's file does not describe",
        score="int32_t" if integer else "float", normalized=NORMALIZED if pixels else "",
    )  # fmt: skip


def _what(program: Program) -> str:
    """Return the name of the network's model for a comment, if it is plain."""
    model = program.about.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return f": {name}" if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) else ""


def _model(state: State, arena: int) -> str:
    maps: list[Map] = []
    for call in state.calls:
        maps += [each for each in (*call.reads, *call.writes) if not any(each is known for known in maps)]
    number = {id(each): index for index, each in enumerate(maps)}
    rows = [
        f"    {{{m.buffer.place}, {m.pixel_bytes}, {m.rows}, {m.columns}, {m.channels}, {m.zero}, "
        f"{literal(np.float32(m.scale))}, {m.type}, {m.low}, {m.high}}}"
        for m in maps
    ]
    image, *others = state.calls
    normalized = ""
    if takes_pixels(state.program):
        steps = ", ".join(image.arguments.split(", ")[-2:])
        normalized = sources.fill(
            "normalized.c", kernel=sources.kernel_text("image_floats.c"),
            first_call=_call(image._replace(kernel="image_floats", arguments=steps), number),
        )  # fmt: skip
    return sources.fill(
        "model.c", arena=arena, patch=max(8, _patch(state)), count=len(maps), maps=",\n".join(rows),
        structs="\n".join(state.structs), first_call=_call(image, number),
        calls="\n".join(f"    {_call(call, number)}" for call in others), normalized=normalized,
    )  # fmt: skip


def _call(call: Call, number: dict[int, int]) -> str:
    first = ["image"] if call.kernel.startswith("image_") else []
    reads, writes = ([f"&maps[{number[id(each)]}]" for each in part] for part in (call.reads, call.writes))
    if call.kernel == "elementwise" and len(reads) == 1:
        reads.append("NULL")
    arguments = [*first, *reads, *writes, *([call.arguments] if call.arguments else [])]
    return f"{call.kernel}({', '.join(arguments)});"


def test_image(program: Program) -> NDArray[Any]:
    """Return a random image (rows, columns, channels), uint8 or float32 as the code takes it."""
    channels, rows, columns = program.shape
    rng = np.random.default_rng(SEED)
    if takes_pixels(program):
        return rng.integers(0, 256, (rows, columns, channels), np.uint8)
    return rng.standard_normal((rows, columns, channels), np.float32)


def _test_vector(program: Program, outputs: list[Output]) -> str:
    image = test_image(program)
    values = image.astype(np.float32)
    if image.dtype == np.uint8:
        scale, shift = normalization(program.about["data"])
        values = values * scale + shift
    found = reference_scores(program, np.ascontiguousarray(values.transpose(2, 0, 1))[None])
    scores = np.concatenate([each.ravel() for each in found])
    if outputs[0].integer:
        scores = np.rint(scores / np.float32(outputs[0].map.scale)).astype(np.int32)
    return (
        "/* Written by micronet: a random image, and what the packed runtime computes for it. */\n"
        f"{define('test_image', image, 'micronet_pixel')}\n{define('test_scores', scores, 'micronet_score')}\n"
    )
