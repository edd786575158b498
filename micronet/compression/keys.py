"""What the notes of a search belong to: all that its measurements depend on, and what is asked for."""

import json
from typing import Any

from micronet.compression.costs import Deployment
from micronet.compression.notes import Notes
from micronet.compression.stage import Compress
from micronet.core.config import flatten
from micronet.core.machine import version
from micronet.recipe.plan import files_named
from micronet.recipe.run import stage_key

NOT_KEYED = ("output", "force", "json", "quiet", "dry_run")
GOALS = ("budget", "max_drop", "minimize", "target_latency", "target_size", "target_macs", "no_training")


def open_notes(settings: Compress, deployment: Deployment, data: dict[str, Any], weights: str = "") -> Notes:
    """Open the notes of a search.

    Args:
        settings: The settings. The key leaves out the goal and the budget: measurements remain valid if they change.
        deployment: Where networks run. The key includes it if latencies are measured, which hold for one machine only.
        data: What is recorded of the data.
        weights: The hash of a network in memory.
    """
    flat = flatten(settings)
    values = {name: value for name, value in flat.items() if name not in (*NOT_KEYED, *GOALS)}
    where = {} if settings.timing.skip_timing else deployment.header
    files = [settings.artifact, *files_named({**flat, "recorded": data.get("name"), "recorded_task": data.get("task")})]
    key = stage_key("compress", {**values, **where, "weights": weights}, files, version())
    goal = json.dumps({name: flat[name] for name in GOALS})
    return Notes.open(settings.folder, key, goal, force=settings.force)
