"""The docstrings of the Python API, made from the help of the stages' settings."""

import re
from textwrap import fill

from micronet import registry
from micronet.stages.keywords import as_keywords
from micronet.stages.stage import Stage

WIDTH = 110
# What the API takes in another way than the command line, or alone.
_HELP = {
    "data": "Name of a data set, a folder or an .npz file; or batches in memory, such as a DataLoader, a list of "
    "(inputs, labels) or one such tuple. Inputs are a tensor of shape (N, ...), several of them, or a dict keyed by "
    "the names of forward's arguments; they are used as they are.",
    "output": "File to write; by default, nothing is written.",
    "example_input": "Example input: a tensor or tuple of tensors; required if no data set determines it.",
    "progress": "An object with ``step`` and ``line`` methods that receives progress updates.",
}
_CITED = ("train", "evaluate", "quantize")  # functions whose keywords others share
_RETURNS = {
    "Artifact": "The network (``model``) with its ``history`` and ``metrics``.",
    "Row": "Accuracy, loss, agreement, latencies in ms, size in bytes, parameters and MACs.",
    "list[Row]": "One row per network, as ``evaluate`` returns it; drop and agreement are relative to the first.",
    "list[Prediction]": "The path of each image, with its classes and their scores, most likely first.",
    "ModelProto": "The ONNX model.",
    "Program": "The packed network.",
    "list[Finding]": "The severity, rule, node, problem and fix of each finding.",
    "ModelProto | Program | Engine | Folder": "What the function for the target returns, or the files by name.",
    "Engine": "The engine's bytes (``data``) and its description (``about``).",
    "list[LayerSensitivity]": "Each layer's signal-to-noise ratio in dB and accuracy drop, most sensitive first.",
    "list[dict[str, object]]": "What was found of each file, by name; ``problem`` if it is damaged or wrong.",
    "dict[str, object]": "The figures by name.",
    "list[Path]": "The file that was written.",
    "str": "The card, in Markdown.",
}
# The command line's terms -> Python's.
_TERMS = (
    (r"Exit with code 1 if", "Raise FailedError if"),
    (r"stops with exit code 3; continue with", "raises StoppedError; continue with"),
    (r"options", "keywords"),
    (r"`?\bmicronet (check-onnx|finetune|train)\b`?", lambda found: f"``{found[1].replace('-', '_')}``"),
)


def documentation(stage: type[Stage], keywords: list[str]) -> str:
    """Return the docstring of a stage's function; keywords that others share are explained once."""
    own, cited = dict.fromkeys(keywords), {}
    for name in _CITED:
        other = registry.load_object(registry.COMMANDS[name].stage)
        if stage.name in (other.name, "train"):
            break
        shared = [key for key in own if _help(stage).get(key) == _help(other).get(key)]
        cited[name] = shared
        own = {key: None for key in own if key not in shared}
    helps = _help(stage)
    lines = [f"{name}: {_in_python(helps[name], stage)}" for name in own]
    lines += [f"{', '.join(names)}: As in ``{other}``." for other, names in cited.items() if names]
    return "\n\n".join(
        [
            stage.summary(),
            *([fill(_in_python(stage.details, stage), WIDTH)] if stage.details else []),
            "Args:\n" + "\n".join(_item(line) for line in lines),
            f"Returns:\n{_item(f'{stage.product}: {_RETURNS[stage.product]}')}",
            "Raises:\n    MicronetError: See the module's documentation.",
        ]
    )


def _help(stage: type[Stage]) -> dict[str, str]:
    """Return what each keyword of a stage's function means."""
    helps = {option.name: option.about["help"] for option in stage.options()}
    changed = [] if stage.name == "run" else ["data", "output"]  # of a recipe, the output is a folder
    changed += ["progress", *["example_input"] * stage.takes_example]
    helps |= {name: _HELP[name] for name in changed}
    if stage.takes_module:
        helps["model"] = f"A network in memory, {helps['model']}"
    return helps


def _in_python(text: str, stage: type[Stage]) -> str:
    for pattern, term in _TERMS:
        text = re.sub(pattern, term, text)
    return as_keywords(text, stage)


def _item(text: str) -> str:
    return fill(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
