"""Coverage-guided fuzzing of readers with atheris: ``python -m tests.fuzz.coverage READER FOLDER SECONDS``.

FOLDER holds what ``corpus.fill`` made. ``scripts/fuzz --coverage`` runs every reader; atheris is installed with
``pip install atheris`` where PyPI has a wheel of it.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Any

import atheris

from micronet.artifact import header
from micronet.core import config, parse, tensor_file
from micronet.data import spec as data_spec
from micronet.errors import MicronetError
from micronet.models import spec as model_spec
from micronet.packed import checks, file_format, levels
from micronet.recipe import reader
from tests.fuzz import mutate
from tests.fuzz.watch import watched

INSTRUMENTED = (
    header, config, parse, tensor_file, data_spec, model_spec, checks, file_format, levels, reader,
)  # fmt: skip
LARGEST = 1 << 20  # bytes of an input


def _read_header(path: Path) -> None:
    found, table = header.read_header(path)
    for record in found.history:
        _ = record.quantizers, record.left_float
    tensor_file.check_tensors(path, table)


# What is read, the files to begin with, and how to change them.
READERS: dict[str, tuple[Callable[[Path], Any], list[str], Callable[[bytes, Random], bytes]]] = {
    "header": (_read_header, ["float.safetensors", "int8.safetensors"], mutate.mutate_tensor_file),
    "packed": (file_format.read, ["float.packed", "int8.packed", "binary.packed"], mutate.mutate_tensor_file),
    "recipe": (reader.read_recipe, ["recipe.toml"], mutate.mutate_toml),
}


def main(name: str, folder: Path, seconds: int) -> None:
    """Fuzz a reader; never returns."""
    read, seeds, change = READERS[name]
    for module in INSTRUMENTED:
        for value in vars(module).values():
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                atheris.instrument_func(value)
    place = Path(tempfile.mkdtemp())
    os.chdir(place)
    corpus = place / "corpus"
    corpus.mkdir()
    for seed in seeds:
        (corpus / seed).write_bytes((folder / seed).read_bytes())
    path = place / f"input{Path(seeds[0]).suffix}"

    def try_input(data: bytes) -> None:
        path.write_bytes(data)
        with watched([]) as seen, suppress(MicronetError):
            read(path)
        if seen:
            raise AssertionError(f"executed: {seen}")

    def mutated(data: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            try:
                return change(bytes(data), random)[:largest]
            except Exception:  # the input has no structure any more
                pass
        return bytes(atheris.Mutate(data, largest))

    limits = ["-timeout=10", "-rss_limit_mb=2048", f"-max_len={LARGEST}", f"-max_total_time={seconds}"]
    atheris.Setup(["fuzz", *limits, str(corpus)], try_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
