"""The kernels, which lie as C files in this package; those in use become one file."""

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from string import Template

from micronet.runtimes.c.functions import function_code

INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)
# Kernels that share a file with another one.
FILES = {
    "depthwise_bytes": "depthwise.c", "depthwise_floats": "depthwise_floats.c", "copy_part": "copy.c",
    "fill_zeros": "fill.c",
}  # fmt: skip


@cache
def text_of(name: str) -> str:
    """Return a file of this package."""
    return files("micronet.runtimes.c").joinpath(name).read_text(encoding="utf-8")


def fill(template: str, **values: object) -> str:
    """Return a template with its names replaced."""
    return Template(text_of(f"templates/{template}")).substitute(values)


def kernel_code(kernels: Iterable[str], functions: list[str]) -> str:
    """Return the code of kernels, of what they include, and of elementwise functions, each once."""
    parts: dict[str, str] = {}
    _collect("base.h", parts)
    if functions:
        _collect("power.c", parts)
    for kernel in kernels:
        _collect(FILES.get(kernel, f"{kernel}.c"), parts)
    code = [*parts.values(), *(function_code(kind) for kind in functions)]
    return "/* Written by micronet: the kernels that the network uses. */\n" + "\n".join(code).rstrip() + "\n"


def _collect(name: str, parts: dict[str, str]) -> None:
    if name in parts:
        return
    for included in INCLUDE.findall(text_of(f"kernels/{name}")):
        _collect(included, parts)
    parts[name] = kernel_text(name)


def kernel_text(name: str) -> str:
    """Return a kernel's file without what it includes."""
    return INCLUDE.sub("", text_of(f"kernels/{name}"))
