"""The text of a model card. Whatever a file says is shown as code, so that nothing in it is markup or a link."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from micronet import registry
from micronet.core.config import accepts, alternatives, options, spell
from micronet.core.image_size import spell_size
from micronet.errors import visible
from micronet.stages.origin import origin_of
from micronet.stages.stage import find
from micronet.stages.words import describe_inputs, without_folder

CLASSIFICATION = "classification"  # the task that files do not name; tasks.task would import torch
LONGEST, MOST = 200, 32  # characters of a value, values of a list
FROM_DATA = ("num_classes", "in_channels", "image_size")  # arguments that a training takes from the data
TO_FILL = "*Fill in:*"


def card_text(about: Mapping[str, Any]) -> str:
    """Return the card of a network, in Markdown, from what ``inspect`` tells of its file."""
    made = origin_of(about)
    path = Path(about["file"])
    sections = {
        f"# {code(path.name)}": [_summary(about, made), f"{TO_FILL} what it is for, and who made it."],
        "## Use": _use(path, made),
        "## Data": _data(made["data"]),
        "## How it was made": _history(about, made),
        "## Metrics": _metrics(made),
        "## Sizes": _sizes(about),
        "## Limits": _limits(about, made),
        "## Licence": [f"{TO_FILL} the licence of the network, and that of its data."],
    }
    whole = ([title, *filter(None, parts)] for title, parts in sections.items() if any(parts))
    return "\n\n".join(map("\n\n".join, whole)) + "\n"


def code(value: Any, *, cell: bool = False) -> str:
    """Return a value as a code span, with control characters escaped; ``cell``: in a table."""
    text = visible(str(value))
    text = f"{text[:LONGEST]}…" if len(text) > LONGEST else text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    span = f"{fence}{space}{text}{space}{fence}"
    return span.replace("|", "\\|") if cell else span


def _block(lines: Iterable[str]) -> str:
    """Return lines of a shell as a code block."""
    text = "\n".join(map(visible, lines))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "| --- | ---: |"]
    return "\n".join(
        [*lines, *(f"| {code(name, cell=True)} | {code(value, cell=True)} |" for name, value in rows.items())]
    )


def _listed(values: Any) -> str:
    values = values if isinstance(values, list) else [values]
    more = f" and {len(values) - MOST:,} more" if len(values) > MOST else ""
    return f"{', '.join(map(code, values[:MOST]))}{more}"


def _summary(about: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    model = made["model"]
    name = f"{code(without_folder(model['name']))}, " if model else ""
    params = about.get("params") or sum(layer.get("params", 0) for layer in about["layers"])
    count = f"{params:,} parameters, " if params else ""
    task = f" Task: {code(without_folder(_task(made)))}." if made["data"] else ""
    kind = {"artifact": "a micronet artifact", "onnx": "an ONNX file", "packed": "a packed network"}
    what = kind.get(about["kind"]) or f"a folder for {code(about['target'])}"
    return f"{name}{what}: {count}{about['size_bytes']:,} bytes.{task}"


def _use(path: Path, made: Mapping[str, Any]) -> list[str]:
    again = [word for pair in _code(made, path.name).items() for word in pair]
    compared = ["compare", "FLOAT"] if _task(made) == "agreement" else ["evaluate"]  # with the float original
    commands = [["micronet", *compared, path.name, *again]]
    if _task(made) == CLASSIFICATION:
        commands.append(["micronet", "predict", path.name, "photo.jpg", *again])
    return [_block(map(shlex.join, commands))]


def _data(data: Mapping[str, Any] | None) -> list[str]:
    if data is None:
        return [f"The file records none. {TO_FILL} the data that it was trained on."]
    lines = [f"- data set: {code(without_folder(str(data['name'])))}"] if data.get("name") else []
    if data.get("inputs"):
        lines += [f"- input: {code(describe_inputs([each]))}" for each in data["inputs"]]
    elif data.get("image_size"):
        channels, size = data.get("channels") or "?", spell_size(data["image_size"])
        lines.append(f"- images: {code(f'{channels}x{size}')}, pixels scaled to 0..1")
    lines += [f"- {key}: {_listed(data[key])}" for key in ("mean", "std", "classes") if data.get(key)]
    return ["\n".join(lines), f"{TO_FILL} where the data come from, and what they leave out."]


def _history(about: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    if not made["history"]:
        return [f"The file records nothing. {TO_FILL} how it was made."]
    versions = f"Versions: {', '.join(f'{code(name)} {code(each)}' for name, each in made['versions'].items())}."
    seed = f"Seed: {code(made['seed'])}." if made["seed"] is not None else ""
    if any(each["config"] for each in made["history"]):
        stages = _block(commands(about, made))
    else:
        names = [each["stage"] for each in made["history"]]
        stages = f"Its stages, whose settings it does not record: {_listed(names)}."
    return [stages, versions if made["versions"] else "", seed]


def commands(about: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Return the command lines that a file's history amounts to; a comment in place of one that is not known."""
    path, lines, before = Path(about["file"]), list[str](), ""
    records = list(made["history"])
    for number, record in enumerate(records):
        last = number == len(records) - 1 and about["kind"] == "artifact"
        after = path.name if last else f"{number + 1}-{record['stage']}.safetensors"
        lines.append(_command(record, made, before, after))
        before = after
    if about["kind"] != "artifact":
        export = ["export", "--target", str(about["target"])] if about["kind"] == "folder" else ["export-onnx"]
        again = (word for pair in _code(made, before).items() for word in pair)
        by_another = about.get("integer_layers") and all(each["stage"] != "quantize" for each in records)
        after = "float.onnx" if by_another else path.name
        lines.append(shlex.join(["micronet", export[0], before, *again, *export[1:], "-o", after]))
        lines += [f"# {path.name}: float.onnx, quantized; the file does not record how"] * bool(by_another)
    return lines


def _command(record: Mapping[str, Any], made: Mapping[str, Any], before: str, after: str) -> str:
    name, config = record["stage"], record["config"]
    if name not in registry.STAGES:
        return f"# {name}: a stage that this version does not know"
    if not before and made["model"] and "args" not in made["model"]:
        return f"# {name}: the file does not record the arguments of {without_folder(made['model']['name'])}"
    stage = find(name)
    known = {option.name: option for option in options(stage) if not option.about["argument"]}
    told = ("output",) if before else ("output", "model")  # by what is around the settings
    changed = {
        key: value for key, value in config.items() if key in known and key not in told and value != known[key].default
    }
    values = {key: value for key, value in changed.items() if accepts(known[key].field.type, value)}
    paths = {key: value for key, value in changed.items() if Path in alternatives(known[key].field.type)}
    values |= {key: without_folder(value) for key, value in paths.items() if isinstance(value, str)}
    again = {option: value for option, value in _code(made, before).items() if option.removeprefix("--") in known}
    source = [before, *(word for pair in again.items() for word in pair)] if before else _source(made)
    return shlex.join(["micronet", name, *source, *spell(stage, values), "-o", after])


def _source(made: Mapping[str, Any]) -> list[str]:
    """Return the options that name the network and the data of the first command."""
    model, data = made["model"], made["data"] or {}
    words = ["--model", without_folder(model["name"])] if model else []
    own = {key: value for key, value in (model["args"] if model else {}).items() if key not in FROM_DATA}
    if isinstance(own.get("width"), int | float):
        words += ["--width", str(own.pop("width"))]
    words += ["--model-args", json.dumps(own)] if own else []
    words += ["--data", without_folder(str(data["name"]))] if data.get("name") else []
    return words + (["--task", without_folder(_task(made))] if _task(made) != CLASSIFICATION else [])


def _metrics(made: Mapping[str, Any]) -> list[str]:
    found = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in made["metrics"].items() if isinstance(value, int | float | str)
    }  # fmt: skip
    if not found:
        return [f"The file records none. {TO_FILL} what {code('micronet evaluate')} measures."]
    return ["Measured when the file was written; accuracies are shares of 1.", _table(("metric", "value"), found)]


def _sizes(about: Mapping[str, Any]) -> list[str]:
    layers = [layer for layer in about["layers"] if layer.get("params")]
    stored = Counter(str(layer.get("quantization") or layer.get("weight") or "float") for layer in layers)
    return [_table(("layers stored as", "number"), dict(stored.most_common(MOST)))] if stored else []


def _limits(about: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    lines = []
    if tested := made["metrics"].get("test_images"):
        lines.append(f"- Its accuracy was measured on {code(tested)} test images of one data set.")
    stages = [record["stage"] for record in made["history"]]
    if about["kind"] == "artifact" and "quantize" in stages:
        lines.append(f"- It simulates integers; {code('micronet export')} writes a file that computes in them.")
    if about["kind"] == "artifact" and _runs_code(made):
        lines.append(f"- Loading it runs code of its author's, {code(without_folder(made['model']['name']))}.")
    left = [name for record in made["history"] for name in _left_float(record)]
    if left:
        lines.append(f"- These layers stay in float: {_listed(left)}.")
    return ["\n".join(lines), f"{TO_FILL} what it must not be used for."]


def _left_float(record: Mapping[str, Any]) -> list[str]:
    result = record.get("result")
    found = result.get("left_float") if isinstance(result, dict) else None
    return list(found) if isinstance(found, dict) else []


def _task(made: Mapping[str, Any]) -> str:
    return str((made["data"] or {}).get("task") or CLASSIFICATION)


def _code(made: Mapping[str, Any], file: str) -> dict[str, str]:
    """Return the options that allow the user's code, which commands that read a file need again."""
    task = {"--task": without_folder(_task(made))} if ":" in _task(made) else {}
    is_code = _runs_code(made) and file.endswith(".safetensors")
    return ({"--model": without_folder(made["model"]["name"])} if is_code else {}) | task


def _runs_code(made: Mapping[str, Any]) -> bool:
    name = made["model"]["name"] if made["model"] else ""
    return ":" in name and not name.startswith("torchvision:")
