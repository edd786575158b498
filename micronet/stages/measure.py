"""What ``compare``, ``evaluate``, ``report`` and ``plot`` measure: the networks of files, on the same data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from micronet.core.config import flag, flatten
from micronet.core.files import file_size, short_names
from micronet.errors import MicronetError, first_line
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.config import MeasureSettings
from micronet.stages.stage import Context

if TYPE_CHECKING:
    from micronet.data.dataset import Dataset, DataSpec
    from micronet.evaluation.accuracy import Evaluation
    from micronet.evaluation.network import Network
    from micronet.evaluation.report import Candidate, Row

SHARED = ("image_size", "mean", "std", "inputs")  # what networks must expect alike of their data


class Measured(NamedTuple):
    """What was measured of networks, of which files they are, and on which data."""

    rows: "list[Row]"
    evaluations: "list[Evaluation]"
    networks: "list[Network]"
    files: list[Path]
    dataset: "Dataset"


class Opened(NamedTuple):
    """A file, and its network."""

    file: Path
    candidate: "Candidate"


def measure(
    files: list[Path],
    config: MeasureSettings,
    context: Context,
    *,
    timed: bool,
    left_out: dict[str, str] | None = None,
) -> Measured:
    """Measure networks on the data named, or that the first one remembers.

    Args:
        files: The networks.
        config: The data and the runtimes.
        context: What surrounds the stage.
        timed: Whether to measure latencies.
        left_out: Where to note the networks that cannot be measured, name -> reason; None: the first one raises.

    Raises:
        MicronetError: A file cannot be opened, the networks take different inputs, or do not score the data's classes.
    """
    from micronet.data.batches import eval_batches
    from micronet.evaluation.accuracy import check_scores
    from micronet.evaluation.report import compare
    from micronet.runtimes.torch import EagerPredictor
    from micronet.stages.inputs import open_test_data

    named = _named(files, config.runtime, context)
    opened, like = _alike(_open_all(named, config, context, left_out), config, left_out)
    models = [each.network.model for _, each in opened if isinstance(each.network, EagerPredictor)]
    dataset = open_test_data(config.data, like, next(iter(models), None))
    if dataset.task.needs_reference and len(opened) == 1:
        raise _needs_float(opened[0].file, config, dataset.task.name)
    for _, each in opened:
        if isinstance(each.network, EagerPredictor) and dataset.inputs is not None:
            each.network.take_in_order(dataset.inputs)
    inputs, _ = next(eval_batches(dataset.test, dataset.spec, batch_size=1))
    opened = _passing(
        opened,
        lambda each: check_scores(each.candidate.network, inputs, dataset.spec, str(each.file), dataset.task),
        left_out,
    )
    candidates = [each for _, each in opened]
    _note_reference(named[0][2], candidates[0].name, left_out or {})
    rows, evaluations = compare(candidates, dataset, context.progress, timed=timed)
    return Measured(rows, evaluations, [each.network for each in candidates], [file for file, _ in opened], dataset)


def _named(files: list[Path], options: RuntimeOptions, context: Context) -> list[tuple[Path, RuntimeOptions, str]]:
    """Return each file with the options to open it by and what to call it."""
    each_file = each_runtime(files, options)
    names = short_names(file for file, _ in each_file)
    return [
        (file, each, file.stem.strip("<>") if file in context.memory.artifacts else name)
        for (file, each), name in zip(each_file, names, strict=True)
    ]


def _open_all(
    named: list[tuple[Path, RuntimeOptions, str]],
    config: MeasureSettings,
    context: Context,
    left_out: dict[str, str] | None,
) -> list[Opened]:
    from micronet.evaluation.report import Candidate

    for file in (file for file, _, _ in named if file not in context.memory.artifacts and not file.exists()):
        open_file(file, config.runtime, context)  # raises, before the others are opened
    found = []
    for file, options, name in named:
        with _noting(name, left_out):
            found.append(Opened(file, Candidate(name, *open_file(file, options, context))))
    return _some(found, left_out)


def _passing(opened: list[Opened], check: Callable[[Opened], None], left_out: dict[str, str] | None) -> list[Opened]:
    """Return the networks for which ``check`` raises nothing."""
    found = []
    for each in opened:
        with _noting(each.candidate.name, left_out):
            check(each)
            found.append(each)
    return _some(found, left_out)


@contextmanager
def _noting(name: str, left_out: dict[str, str] | None) -> Iterator[None]:
    """Note why a network cannot be measured, unless its error is to be raised."""
    try:
        yield
    except (MicronetError, OSError) as error:
        if left_out is None:
            raise
        left_out[name] = first_line(error)


def _some(opened: list[Opened], left_out: dict[str, str] | None) -> list[Opened]:
    if not opened and left_out:
        raise MicronetError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    return opened


def _note_reference(first: str, used: str, left_out: dict[str, str]) -> None:
    """Say what the figures are relative to if the first network is left out."""
    if first in left_out and first != used:
        left_out[first] += f"; it was to be the reference, so drops are relative to {used} instead"


def _needs_float(file: Path, config: MeasureSettings, task: str) -> MicronetError:
    from micronet.data.memory import NAME as MEMORY

    given = flatten(config)
    typed = [name for name in ("model", "task", "data") if given.get(name) is not None and given[name] != MEMORY]
    command = " ".join(["micronet compare FLOAT", str(file), *(f"{flag(name)} {given[name]}" for name in typed)])
    return MicronetError(f"--task {task} needs the float original; run {command}")


def each_runtime(files: list[Path], options: RuntimeOptions) -> list[tuple[Path, RuntimeOptions]]:
    """Return each file with the options to open it by; an ONNX file once per runtime that the options name."""
    return [
        (file, replace(options, runtime=name))
        for file in files
        for name in (options.runtimes if file.suffix == ".onnx" else options.runtimes[:1])
    ]


def open_file(file: Path, runtime: RuntimeOptions, context: Context) -> "tuple[Network, int]":
    """Open a network; return it with the size of its file in bytes."""
    from micronet.runtimes.network import open_network

    if file not in context.memory.artifacts:
        return open_network(file, runtime), file_size(file)
    from micronet.artifact.artifact import save
    from micronet.core.files import temporary_folder
    from micronet.models.modes import copy_model
    from micronet.runtimes.torch import EagerPredictor

    held = context.memory.artifacts[file]
    held = replace(held, model=copy_model(held.model))  # the caller's network keeps its mode and device
    with temporary_folder() as folder:
        written = folder / "network.safetensors"
        save(held, written)
        return EagerPredictor(held, runtime), file_size(written)


def _specs(opened: list[Opened]) -> "list[DataSpec]":
    return [data for _, each in opened if (data := each.network.data)]


def _alike(
    opened: list[Opened], config: MeasureSettings, left_out: dict[str, str] | None
) -> "tuple[list[Opened], DataSpec]":
    """Return the networks that can share their data, and these data."""
    if config.data.task is None and len(tasks := sorted({spec.task for spec in _specs(opened)})) > 1:
        raise MicronetError(f"the files are for different tasks ({', '.join(tasks)}); choose one with --task")
    like = _common_spec(_specs(opened if left_out is None else _most_alike(opened)))
    return _passing(opened, lambda each: _check_same_input(each.candidate, like), left_out), like


def _most_alike(opened: list[Opened]) -> list[Opened]:
    """Return the largest group of networks that can share their data; of equal ones, that of the first network."""

    def group(leader: Opened) -> list[Opened]:
        expected: dict[str, Any] = {}
        found = []
        for each in (leader, *(other for other in opened if other is not leader)):
            own = _expected(each.candidate.network.data)
            if all(expected.get(key, value) == value for key, value in own.items()):
                expected |= own
                found.append(each)
        return found

    return max(map(group, opened), key=len)


def _expected(data: "DataSpec | None") -> dict[str, Any]:
    """Return what a network is known to expect of its data."""
    known = {**{key: getattr(data, key, None) for key in SHARED}, "classes": len(getattr(data, "classes", None) or ())}
    return {key: value for key, value in known.items() if value not in (None, 0)}


def _common_spec(specs: "list[DataSpec]") -> "DataSpec":
    """Return what the networks expect of their images: the first one's values, completed by the others'."""
    from micronet.data.dataset import DataSpec

    known: dict[str, Any] = {}
    for spec in specs:
        known = {**{key: value for key, value in spec.to_json().items() if value is not None}, **known}
    return replace(DataSpec(), **known)


def _check_same_input(candidate: "Candidate", like: "DataSpec") -> None:
    """Raise MicronetError if a network expects images prepared in another way than the others."""
    for key in SHARED:
        own, other = getattr(candidate.network.data, key, None), getattr(like, key)
        if None not in (own, other) and own != other:
            raise MicronetError(
                f"{candidate.name} expects {'' if key == 'inputs' else 'images with '}{key} {own}, but another file "
                f"expects {other}; compare only files that expect the same"
            )
