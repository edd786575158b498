"""The metrics of a float ONNX model and of its int8 form, by the task of the data set that it is for."""

from functools import partial
from typing import TYPE_CHECKING, Any

from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import check_scores, evaluate

if TYPE_CHECKING:
    from micronet.stages.float_model import FloatModel


def measure_by_task(model: "FloatModel", dataset: Dataset, sessions: list[Any]) -> dict[str, Any]:
    """Return the int8 model's metrics on the test data and the float one's main one; nothing if it has other outputs.

    ``sessions``: the float and the int8 model. Raises MicronetError if the user named a task that the model does not
    suit.
    """
    image, task = model.image_input(dataset.spec), dataset.task
    predictors = [partial(image.predict, partial(session.run, None)) for session in sessions]
    sample, _ = next(eval_batches(dataset.test, dataset.spec, batch_size=1))
    try:
        check_scores(predictors[0], sample, dataset.spec, str(model.file), task)
    except MicronetError:
        if model.data.task is not None:
            raise
        return {}
    before, after = (
        evaluate(predict, eval_batches(dataset.test, dataset.spec), task=task).metrics for predict in predictors
    )
    measured = {f"test_{name}": value for name, value in after.items()}
    about = {"test_images": len(dataset.test), "noun": dataset.test.noun}
    return {**measured, f"float_test_{task.main}": before[task.main], **about}
