"""The data sets of a recipe, opened before its first stage runs, so that one missing at the last costs no time."""

from dataclasses import replace
from pathlib import Path

from micronet.artifact.header import read_header
from micronet.core.image_size import parse_size
from micronet.data.dataset import DataSpec
from micronet.data.load import load_data
from micronet.errors import MicronetError
from micronet.recipe.plan import Planned
from micronet.recipe.reader import Recipe
from micronet.stages.inputs import DEFAULT_DATA
from micronet.stages.keywords import spell_as_keywords
from micronet.stages.stage import uses


def check_data(recipe: Recipe, planned: list[Planned]) -> None:
    """Open every data set that a stage names or takes over from its input, without decoding images.

    Raises:
        MicronetError: With the line: a data set cannot be opened, or a stage needs one and knows none.
        FailedError: A data set could not be downloaded.
    """
    recorded: dict[Path, DataSpec] = {}  # by the files that the recipe makes
    opened: dict[tuple[str | None, str, str], DataSpec] = {}
    for each in planned:
        stage = each.configured()
        named, size = each.values.get("data"), parse_size(each.values.get("image_size"))
        spec = _of_input(stage.input(), recorded, DEFAULT_DATA if stage.needs_data() else None)
        if spec is not None and uses(each.stage, "data") and (named or stage.needs_data()):
            task = each.values.get("task")
            own = size or spec.image_size
            key = (named or spec.name, str(own), task or spec.task)
            if key not in opened or spec.classes not in (None, opened[key].classes):
                try:
                    with spell_as_keywords(each.stage, recipe=True):
                        limit = each.values.get("limit")
                        classes = load_data(named, image_size=size, limit=limit, like=spec, task=task).classes
                except MicronetError as error:
                    error.args = (str(recipe.error(each.entry.line, f"{each.entry.command}: {error}")),)
                    raise
                opened[key] = replace(spec, name=key[0], image_size=own, task=key[2], classes=classes)
            spec = opened[key]
        if spec is not None and each.output is not None:
            recorded[each.output] = spec


def _of_input(path: Path | list[Path] | None, recorded: dict[Path, DataSpec], default: str | None) -> DataSpec | None:
    """Return the data that a stage's input records; None if that is not known before it is opened."""
    first = path[0] if isinstance(path, list) else path
    if first is None:
        return DataSpec(default)
    if first in recorded or first.suffix != ".safetensors" or not first.exists():
        return recorded.get(first)
    return DataSpec.from_json(read_header(first)[0].data)
