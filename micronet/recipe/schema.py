"""The JSON Schema of recipes and of single stages, from the declarations of their settings."""

from dataclasses import dataclass
from typing import Any

from micronet import registry
from micronet.core.config import json_schema, setting
from micronet.errors import unknown
from micronet.stages.stage import Context, Outcome, Stage, find

DRAFT = "http://json-schema.org/draft-07/schema#"


@dataclass(frozen=True)
class Schema(Stage):
    """Prints a schema."""

    name = "schema"
    details = "To use it, put this on the first line of a recipe: #:schema recipe.schema.json"
    example = "micronet schema recipe"
    suffix = None
    product = "dict[str, object]"

    of: str = setting(
        "recipe",
        "Schema to print: recipe, or a stage name such as train.",
        argument=True,
        metavar="[SUBJECT]",
        names="stages",
    )

    def run(self, context: Context) -> Outcome:
        """Return the schema of recipes or of one stage."""
        if self.of == "recipe":
            schema = recipe_schema()
        elif self.of in registry.STAGES:
            schema = stage_schema(find(self.of))
        else:
            raise unknown("schema", self.of, ["recipe", *registry.STAGES])
        return Outcome(schema, schema)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a whole recipe."""
    tables = []
    for name in registry.STAGES:
        stage = stage_schema(find(name))
        own = {"command": {"const": name}, "name": {"type": "string", "pattern": r"^\w[\w-]*$"}}
        output = {"type": "string", "description": "Name of the file in the recipe's output folder."}
        properties = {**own, **stage["properties"], "output": output}
        tables.append({**stage, "properties": properties, "required": ["command"]})
    return {
        "$schema": DRAFT,
        "title": "micronet recipe",
        "type": "object",
        "properties": {
            "folder": {"type": "string", "description": "Folder for the results (default: runs/<recipe name>)."},
            "stage": {"type": "array", "items": {"oneOf": tables}},
        },
        "required": ["stage"],
        "additionalProperties": False,
    }


def stage_schema(stage: type[Stage]) -> dict[str, Any]:
    """Return the JSON Schema of a stage's settings."""
    return {"title": stage.name, "description": stage.summary(), **json_schema(stage)}
