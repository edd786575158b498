"""Have torch export a network to an ONNX graph whose inputs and outputs have the network's own names."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx import config as fx_config
from torch.fx.experimental import _config as sizes_config

from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError, first_line
from micronet.models.calling import argument_names, return_tensors, takes_names
from micronet.models.device import Inputs
from micronet.models.modes import state_kept
from micronet.models.outputs import output_names
from micronet.onnx import operators
from micronet.onnx.attention import UnusualAttention, attention_translation
from micronet.onnx.config import AXES, ExportConfig
from micronet.onnx.cumulative import cumprod_translation
from micronet.onnx.failures import describe_failure
from micronet.onnx.lengths import lengths_stay_free
from micronet.onnx.recurrent import recurrent_translations, shapes_alone
from micronet.onnx.whole_pools import WholePools

INPUT, OUTPUT = "images", "scores"  # of networks that take images (N, C, H, W), or return one tensor
IMAGE_RANK = 4
# What torch.export says of a size that a forward fixes.
_STATIC = re.compile(r"inferred a static shape of \d+ for dimension inputs\[(\d+)\]\.shape\[(\d+)\]")
EXPORTER = "[torch.onnx]"  # begins the lines that the exporter prints
PHASES = {  # how such a line goes on -> the phase that begins, most of an export's time
    "Obtain": "recording the network", "Run decompositions": "decomposing operators",
    "Translate": "translating to ONNX", "Optimize": "optimizing the graph",
}  # fmt: skip


class _Phases(io.TextIOBase):
    """Standard output while torch exports: what the exporter says of its phases is progress, other lines pass."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._out, self._line = progress, sys.stdout, ""

    def write(self, text: str) -> int:
        """Take text, and pass on complete lines that are not the exporter's."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if not line.startswith(EXPORTER):
                self._out.write(line + "\n")
                continue
            for number, (start, phase) in enumerate(PHASES.items()):
                if line.startswith(f"{EXPORTER} {start}") and line.endswith("..."):
                    self._progress.step(f"exporting: {phase}", number, len(PHASES))
        return len(text)

    def close(self) -> None:
        """Pass on what is left of a line."""
        if not self.closed and self._line:
            self._out.write(self._line)
        super().close()


def export_graph(
    model: nn.Module, images: Tensor | Inputs, config: ExportConfig, progress: Progress | None = None
) -> ir.Model:
    """Export a network, which is changed in place: it returns a tuple of tensors afterwards.

    An input has the name of the forward's argument, an output that of the key or field that leads to it (see
    ``output_names``). Only a single input of images is called ``images``, and an output without a name ``scores``.

    Raises:
        MicronetError: The network does not accept the inputs, or torch cannot export it.
    """
    axes = config.axes
    batch = images if isinstance(images, Inputs) else Inputs([images])
    samples = 2 if 0 in axes else 1  # torch would fix the size of an axis of size 1
    example = tuple(x[:samples].contiguous() for x in batch)
    _check_axes(batch, config)
    try:  # the exporter's own message would hide the reason
        # What a forward keeps for the next call, such as cosines of each position, may depend on the inputs' sizes.
        with state_kept(model), torch.no_grad(), UnusualAttention() as attention:
            returned = model(*example)
    except Exception as error:  # the user's code may raise anything
        shape = " and ".join("x".join(map(str, x.shape)) for x in example)
        raise MicronetError(f"the network does not accept an input of shape {shape}: {first_line(error)}") from error
    are_images = len(batch) == 1 and batch[0].dim() == IMAGE_RANK and batch[0].is_floating_point()
    inputs = [INPUT] if are_images and not takes_names(model) else argument_names(model, len(batch))
    outputs = [name or OUTPUT for name in output_names(returned)]
    if not isinstance(returned, Tensor):
        return_tensors(model, len(batch))
    translations = operators.translations(config.opset) | recurrent_translations(model, config.opset)
    translations |= cumprod_translation(config.opset)
    if attention.found:
        translations |= attention_translation(config.opset)
    progress = progress or Silent()
    exported = _export(model, example, axes, inputs, config.opset, translations, progress)
    _name_values(exported.graph, inputs, outputs)
    for owner, name, size in _name_axes(exported.graph, axes):
        progress.line(f"warning: {name} of {owner} stays {size}, because the network fixes it")
    return exported


def _check_axes(batch: Inputs, config: ExportConfig) -> None:
    """Raise MicronetError if an axis that is to stay free is not one of the inputs'."""
    ranks = [x.dim() for x in batch]
    sides = {"height", "width"}.intersection(config.free_axes)
    if sides and ranks != [IMAGE_RANK]:
        found = " and ".join(", ".join(["batch", *map(str, x.shape[1:])]) for x in batch)
        raise MicronetError(
            f"--dynamic {config.dynamic}: only images (batch, channels, height, width) have a height and a width, but "
            f"the axes of this network's inputs are {found}; name an axis by its number, as in --dynamic batch,1"
        )
    if (last := max(config.axes, default=0)) >= max(ranks):
        raise MicronetError(
            f"--dynamic {config.dynamic}: no input has an axis {last}; the last one is {max(ranks) - 1}, and 0 is batch"
        )


def _export(
    model: nn.Module, example: tuple[Tensor, ...], axes: dict[int, str], inputs: list[str], opset: int,
    translations: dict[Any, Any], progress: Progress,
) -> ir.Model:  # fmt: skip
    """Return a network's ONNX model; an input that fixes an axis keeps its size if another input leaves it free.

    Raises MicronetError if no input leaves it free, or torch cannot export the network.
    """
    fixed: set[tuple[int, int]] = set()  # inputs and axes
    while True:
        try:
            with closing(_Phases(progress)) as phases, redirect_stdout(phases):
                exported: ir.Model = _run_exporter(model, example, axes, fixed, inputs, opset, translations).model
                return exported
        except Exception as error:  # the exporter wraps the error that names the reason in one of several types
            static = {(int(index), int(axis)) for index, axis in _STATIC.findall(str(error))} - fixed
            if not static:
                cure = "--dynamic batch" if len(axes) > 1 else "--dynamic none, a file for one sample at a time"
                raise MicronetError(
                    "torch cannot export this network to ONNX: "
                    f"{describe_failure(error, model, f'; try {cure}' if axes else '')}"
                ) from error
            fixed |= static
            for axis, name in axes.items():
                if all((index, axis) in fixed for index, x in enumerate(example) if axis < x.dim()):
                    raise MicronetError(_describe_fixed(name)) from error


def _run_exporter(
    model: nn.Module, example: tuple[Tensor, ...], axes: dict[int, str], fixed: Collection[tuple[int, int]],
    inputs: list[str], opset: int, translations: dict[Any, Any],
) -> Any:  # fmt: skip
    """Return torch's program for a network; raises whatever the exporter raises."""
    with _silent(), shapes_alone(model), lengths_stay_free(model), WholePools(), torch.no_grad():
        free = {
            axis: torch.export.Dim(name) if name in AXES else torch.export.Dim.DYNAMIC for axis, name in axes.items()
        }
        shapes: Any = tuple(
            {axis: dim for axis, dim in free.items() if axis < x.dim() and (index, axis) not in fixed}
            for index, x in enumerate(example)
        )
        source: Any = model
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # else torch unrolls or loops
            source = _record(model, example, shapes)
        program = torch.onnx.export(
            source,
            () if source is not model else example,
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            dynamic_shapes=shapes if source is model else None,
            custom_translation_table=translations,
            optimize=True,
            verbose=True,  # see _Phases
        )
    assert program is not None  # with dynamo=True it returns a program
    return program


def _record(model: nn.Module, example: tuple[Tensor, ...], shapes: Any) -> Any:
    """Return torch's record of a network, with the bounds of its free sizes that torch finds.

    Such a bound is the least width for which a pool has an output. torch.onnx finds them the same way, with the same
    private setting: without it, a size that may be 1 is an error, too.
    """
    try:
        return torch.export.export(model, example, dynamic_shapes=shapes)
    except UserError as error:
        try:
            bounded = refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
        except Exception:  # torch raises several types if its message has no suggestion that it can read
            bounded = shapes
        with sizes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # torch adds it
            return torch.export.export(model, example, dynamic_shapes=bounded)


def _name_values(graph: ir.Graph, inputs: list[str], outputs: list[str]) -> None:
    """Give a graph's inputs and outputs names; inner tensors of those names get others."""
    for value in (value for node in graph.all_nodes() for value in node.outputs):
        if value.name in {*inputs, *outputs}:
            value.name = f"{value.name}_inner"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    taken = {*inputs, *graph.initializers}
    for value, name in zip(graph.outputs, outputs, strict=True):
        if value.is_graph_input() or value.is_initializer():
            continue  # it is returned as it is, under its own name
        free = name
        while free in taken:
            free += "_out"
        value.name = free
        taken.add(free)


def _name_axes(graph: ir.Graph, axes: dict[int, str]) -> list[tuple[str, str, int]]:
    """Give the dynamic axes of a graph's inputs, and equal ones of its outputs, these names.

    Axes of the same number that may differ between inputs get the name of the input, too. Returns the inputs, axes and
    sizes that the network fixes although they are free in other inputs.
    """
    names: dict[str, str] = {}
    fixed: list[tuple[str, str, int]] = []
    for axis, name in axes.items():
        shapes = [(value.name, value.shape) for value in graph.inputs if value.shape is not None]
        sizes = [(owner, shape[axis]) for owner, shape in shapes if axis < len(shape)]
        free = [(owner, str(size)) for owner, size in sizes if not isinstance(size, int)]
        if not free or (name in AXES and isinstance(sizes[0][1], int)):  # a number may be free in some inputs only
            raise MicronetError(_describe_fixed(name))
        fixed += [(str(owner), name, size) for owner, size in sizes if isinstance(size, int)]
        for owner, size in free:
            names.setdefault(size, f"{owner}_{name}" if name in names.values() else name)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(size), size) for size in value.shape])
    return fixed


def _describe_fixed(name: str) -> str:
    """Say that a network fixes the size of an axis."""
    cure = "--dynamic none, a file for one sample at a time" if name == "batch" else "--dynamic batch"
    reason = (
        "a Python loop over the samples or int(x.shape[0])"
        if name == "batch"
        else ("a loop over it, int(x.shape[...]), or weights of that size")
    )
    return (
        f"the network fixes the size of the axis {name} as it was for the example, for instance by {reason}; write it "
        f"with tensor operations and x.shape, or pass {cure}"
    )


@contextmanager
def without_stacks() -> Iterator[None]:
    """Keep torch from recording, for every node, the lines of code that made it, which takes long."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # older torch records them anyway
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from reporting, over many lines, what its exception also says; every setting is put back."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        # torch.export prints the graph of a failed export straight to sys.stderr.
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
