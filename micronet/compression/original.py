"""The original: the first candidate, and whether a search that begins with it makes sense."""

from micronet.compression.judge import DataJudge
from micronet.compression.plan import Plan
from micronet.compression.point import Point
from micronet.compression.stage import Compress
from micronet.compression.words import describe_chance
from micronet.compression.workshop import Workshop
from micronet.errors import MicronetError


def measure_original(workshop: Workshop, settings: Compress) -> Point:
    """Measure the original, and warn of what would make the figures say nothing.

    Raises MicronetError if the budget is too short for it, or if drops of the metric are not counted in hundredths.
    """
    judge = workshop.judge
    if judge.metric is not None and judge.metric != judge.task.main:
        better = "more" if judge.task.prefers_more(judge.metric) else "less"
        workshop.progress.line(f"--metric {judge.metric}: {better} is better")
    original = workshop.confirm("float", Plan())
    workshop.check_budget(settings.budget)
    if judge.metric is not None and original.quality > 1:
        raise MicronetError(
            f"--metric {judge.metric} is {original.quality:.4g} for the original; --max-drop is in hundredths, so "
            "choose a metric that is at most 1, or one of which less is better"
        )
    if isinstance(judge, DataJudge) and (judge.metric or judge.task.main) == "accuracy":
        for line in describe_chance(original.quality, len(judge.data.classes or []), judge.samples, "validation"):
            workshop.progress.line(line)
    return original
