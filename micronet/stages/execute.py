"""The one sequence in which any stage runs: open the input, check the order, run, write, report."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import flatten, options
from micronet.core.files import FOLDER, check_cache_path, check_output_path, check_report_path, temporary_folder
from micronet.core.folders import check_output_folder
from micronet.core.progress import Progress, Silent
from micronet.errors import MicronetError, count, listed
from micronet.stages.stage import Context, Memory, Outcome, Purpose, Stage, uses
from micronet.stages.words import next_command

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

_NAMED = 3  # of the weights made plain


def execute(
    stage: Stage, progress: Progress | None = None, memory: Memory | None = None, *, keep: bool = True
) -> Outcome:
    """Run a stage from its input to its written output.

    Args:
        stage: The stage with its settings, from ``configure``.
        progress: Where it reports progress.
        memory: What is given in memory rather than in files.
        keep: Whether to write the product if the settings name no output.

    Returns:
        The product and its summary; ``output`` and ``size_bytes`` are in the summary of a written file.

    Raises:
        MicronetError: The input, the settings, the order of stages or the output is invalid.
    """
    values, memory, computed = flatten(stage), memory or Memory(), dict[str, Any]()
    with ExitStack() as temporary:
        suffix = stage.writes()
        written = suffix is not None and (keep or values.get("output") is not None)
        if written:
            path = values["output"] or stage.default_output()
            _check_output(path, suffix or "", force=values["force"], resume=values.get("resume", False))
        elif suffix is not None or uses(type(stage), "data"):
            path = temporary.enter_context(temporary_folder()) / f"result{suffix or ''}"
        else:
            path = Path()  # a report that trains and calibrates nothing needs no place
        _check_places(stage)
        source = stage.open(memory.source)
        if source is not None:
            if source is memory.source:  # a file is checked as it is read
                from micronet.models.finite import check_finite

                check_finite(source.model, "the network")
            stage.check_order([record.stage for record in source.history])
            source, memory = _settle_inputs(source, memory, values.get("data"))
            source, computed = _with_plain_weights(stage, source, memory, values.get("data"), progress or Silent())
        outcome = stage.run(Context(source, path, progress or Silent(), memory, temporary=not written))
        if source is not None and computed and isinstance(outcome.product, type(source)):
            for record in outcome.product.history[len(source.history) :][:1]:
                record.result.update(computed)
        if written and outcome.product is not None:
            finish(lambda: stage.write(outcome.product, path), path if stage.trains() else None)
            stage.add_file(outcome.summary, path)
            if (following := stage.next_stage(outcome.product)) and not outcome.summary.get("untraced"):
                outcome.summary["next"] = next_command(following, path, stage, outcome.product)
    return outcome


def _settle_inputs(source: "Artifact", memory: Memory, data: str | None) -> tuple["Artifact", Memory]:
    """Return an example as a network takes it; a network that takes names gets, and records, an order of its inputs."""
    from micronet.data.dataset import DataSpec
    from micronet.data.memory import MemoryData
    from micronet.models.inputs import inputs_in, settle_order

    first = _given_example(memory, data)
    described = None if first is None else settle_order(source.model, first)
    if described is not None:
        is_labelled = isinstance(data, MemoryData) and data.is_labelled(source.model)
        new = DataSpec() if is_labelled else DataSpec(task="agreement")
        spec = DataSpec.from_json(source.data) if source.data else new
        source = replace(source, data=replace(spec, inputs=described).to_json())
    example = memory.example
    return source, replace(
        memory, example=inputs_in(source.model, example) if isinstance(example, Mapping) else example
    )


def _given_example(memory: Memory, data: Any) -> Any:
    """Return an input that was given in memory, or None."""
    from micronet.data.memory import MemoryData

    return data.example if isinstance(data, MemoryData) else memory.example


def _with_plain_weights(
    stage: Stage, source: "Artifact", memory: Memory, data: Any, progress: Progress
) -> tuple["Artifact", dict[str, Any]]:
    """Return the input with the weights that it computes made plain, if the stage wants them, and what records it."""
    purpose = stage.plain_weights()
    if purpose is None or any(record.quantizers for record in source.history):
        return source, {}  # quantized layers keep what they were trained with until they are exported
    from micronet.data.memory import MemoryData
    from micronet.graph.plain_weights import with_plain_weights
    from micronet.pruning.weights import with_weights_to_cut
    from micronet.stages.inputs import example_input

    given = data.inputs(source.model, 1)[0] if isinstance(data, MemoryData) else memory.example
    example = example_input(source) if given is None else given
    if purpose == "pruning":
        model, result = with_weights_to_cut(source.model, example)
    else:
        model, result = with_plain_weights(source.model, example, purpose)
    if not result:
        return source, {}
    _report_plain_weights(result, purpose, progress)
    return replace(source, model=model), result


def _report_plain_weights(result: Mapping[str, Any], purpose: Purpose, progress: Progress) -> None:
    """Say which weights are stored otherwise than before, and what that means for a training."""
    from micronet.graph.plain_weights import COMPUTED, TRANSPOSED

    if names := result[COMPUTED]:
        progress.line(
            f"stored the values of {count(len(names), 'computed weight')}, the outputs stay: {listed(names, _NAMED)}"
        )
        if purpose == "pruning":
            progress.line(
                "a later training changes these values, and no longer computes them, as by a normalization or a mask"
            )
    if names := result.get(TRANSPOSED):
        matrices = "1 matrix" if len(names) == 1 else f"{len(names):,} matrices"
        progress.line(f"stored {matrices} transposed, as linear layers do: {listed(names, _NAMED)}")


def finish(write: Callable[[], None], trained: Path | None) -> None:
    """Write a result, by rank 0 alone; then remove the checkpoint of a training, which could have recreated it.

    Args:
        write: Writes the result.
        trained: The output of the training, or None if the stage did not train.
    """
    from micronet.training import distributed
    from micronet.training.checkpoint import Checkpoint

    def work() -> None:
        write()
        if trained is not None:
            Checkpoint.beside(trained, {}).remove()

    distributed.from_rank_zero(work)


def _check_output(path: Path, suffix: str, *, force: bool, resume: bool) -> None:
    """Raise MicronetError if a result cannot be written to a path, or one is there already."""
    from micronet.training import distributed

    def check() -> None:
        if resume and path.exists() and not force:
            raise MicronetError(f"{path} is already finished, so there is nothing to resume; add --force to start over")
        if suffix == FOLDER:
            check_output_folder(path, force=force)
        else:
            check_output_path(path, force, suffix)

    distributed.from_rank_zero(check)


def _check_places(stage: Stage) -> None:
    """Raise MicronetError if a cache or another file that the settings name cannot be written."""
    checks = {"cache": check_cache_path, "file": check_report_path}
    values = flatten(stage)
    for option in options(type(stage)):
        if option.about["place"] is not None:
            checks[option.about["place"]](values[option.name])
