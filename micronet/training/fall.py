"""Whether a training left a network worse than it found it."""

from typing import Any

from micronet.core.metrics import value_text
from micronet.tasks.task import Task
from micronet.training.config import TrainConfig, TrainHooks

LARGEST_RISE = 0.25  # of a metric of which less is better, relative: noise of an error is a share of it


def is_fall(before: dict[str, Any], after: dict[str, Any], task: Task, largest: float) -> bool:
    """Return whether the main metric on the validation data is much worse than before the training.

    Args:
        before: Metrics of ``validate``, before the training.
        after: Metrics of the epoch whose weights are the result.
        task: Says which metric is the main one, and whether more of it is better.
        largest: The largest fall that is not worth a word, relative to the value before. A metric of which less is
            better may rise by LARGEST_RISE, and from 0, that of a network which is its own reference, by anything.
    """
    was, now = (task.quality({task.main: row[f"validation_{task.main}"]}) for row in (before, after))
    share = largest if task.higher_is_better else max(largest, LARGEST_RISE)
    return was != 0 and not now >= was - share * abs(was)  # NaN is a fall, too


def can_be_undone(hooks: TrainHooks, config: TrainConfig, task: Task) -> bool:
    """Return whether a training that made a network worse may give it back its weights from before.

    That is judged by a reference alone, not by labels: an imported network may have seen the validation images, and
    then does worse on them once it is trained. It also takes the best epoch, and the same network before and after.
    """
    same = hooks.before_step is None and config.chosen("whiten") != "on"
    return same and task.needs_reference and hooks.keep == "best"


def describe_fall(
    before: dict[str, Any], after: dict[str, Any], task: Task, lr: float, way_out: str, *, undone: bool
) -> str:
    """Return the warning: the metric before and now, whether it was undone, and what to try."""
    was, now = (value_text(task.main, row[f"validation_{task.main}"]) for row in (before, after))
    kept = ", so the weights from before are kept" if undone else ""
    return (
        f"warning: the validation {task.main} was {was} before the training and is {now} now{kept}; a lower "
        f"learning rate, such as --lr {lr / 10:g}, or {way_out} may prevent this"
    )
