"""``card``: what a file says of itself, in Markdown that nothing in the file can break out of."""

import json
import re
import shlex

import onnx
import pytest
import typer.main
from onnx import helper

from micronet.artifact.header import KEY, read_header
from micronet.cli.app import app
from micronet.core.tensor_file import seal
from micronet.stages.card_text import TO_FILL, card_text, code, commands
from micronet.stages.inspect_artifact import inspect_file
from micronet.stages.origin import origin, origin_of

EVIL = "```\n# Title\n[x](http://evil.example) <script>alert(1)</script> `|` **b** \x1b[2J\u202e ``` | a"


def spans_removed(text):
    """Return what is left of Markdown without its code blocks and code spans, as CommonMark delimits them."""
    text = re.sub(r"^(`{3,})sh\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("name", ["float.safetensors", "fused.safetensors", "float.onnx", "int8.onnx"])
def test_a_card_says_what_the_file_does_and_its_commands_are_commands(micronet, chain, name):
    card = micronet("card", chain / name).out
    told = inspect_file(chain / name)
    assert card.startswith(f"# `{name}`\n") and card.count(TO_FILL) >= 4
    for value in (f"{told['size_bytes']:,} bytes", "`digits`", "`3x32x32`", "## Licence"):
        assert value in card
    [block] = re.findall(r"## How it was made\n\n```sh\n(.*?)\n```", card, re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    history = (told if told["kind"] == "artifact" else told["metadata"])["history"]
    assert [line[1] for line in lines][: len(history)] == [each["stage"] for each in history]
    assert lines[-1][-1] == name
    for before, line in zip([None, *lines], lines, strict=False):  # each takes what the one before writes
        assert before is None or line[2] == before[-1]
        command = typer.main.get_command(app).commands[line[1]]
        with command.make_context(line[1], line[2:]) as context:  # raises if an option or a value is unknown
            assert context.params
    assert "--width 0.1" in block and ("`test_accuracy`" in card) == (name == "float.safetensors")


def test_a_card_gives_no_command_that_a_file_does_not_record(micronet, chain, tmp_path):
    about = inspect_file(chain / "int8.onnx")
    del about["metadata"]["model"]["args"]  # as in files of earlier versions
    lines = commands(about, origin_of(about))
    assert lines[0] == "# train: the file does not record the arguments of nin"
    assert lines[1].startswith("micronet quantize 1-train.safetensors ") and lines[-1].endswith(" -o int8.onnx")
    again = tmp_path / "again.onnx"
    ptq = ("--mode", "ptq", "--limit", 40, "--skip-timing", "-o", again)
    assert micronet("quantize", chain / "float.onnx", *ptq).code == 0
    assert micronet("card", again).out.count("# again.onnx: float.onnx, quantized; the file does not record how") == 1
    packed = {"kind": "packed", "file": "a.packed", "size_bytes": 1, "layers": []}
    card = card_text({**packed, "metadata": origin({"model": "nin", "stages": ["train", "quantize"]})})
    assert "Its stages, whose settings it does not record: `train`" in card and "micronet train" not in card


def test_a_card_is_written_once_and_read_by_python(micronet, chain, tmp_path):
    import micronet as api

    path = tmp_path / "card.md"
    done = micronet("card", chain / "int8.onnx", "-o", path)
    assert done.code == 0 and done.out == f"wrote {path}  {path.stat().st_size:,} bytes\n"
    assert api.card(chain / "int8.onnx") == path.read_text() == micronet("card", chain / "int8.onnx").out
    done = micronet("card", chain / "int8.onnx", "-o", path)
    assert done.code == 2 and "--force" in done.err
    assert micronet("card", chain / "int8.onnx", "-o", path, "--force").code == 0
    assert micronet("card", chain / "int8.onnx", "-o", tmp_path / "card.txt").code == 2
    assert micronet("card", chain / "int8.onnx", "--json").json == {"card": path.read_text()}


@pytest.mark.parametrize("text", ["", "`", "``a`", " a ", "a|b", "x" * 999, EVIL], ids=range(7))
def test_a_code_span_holds_any_text(text):
    span = code(text, cell=True)
    assert "\n" not in span and len(span) < 300
    assert spans_removed(f"a {span} b") == "a  b"
    assert re.sub(r"\\\|", "", span).count("|") == 0


NIN = {"name": "nin", "args": {}}


def test_a_card_names_files_without_their_folders(tmp_path):
    origin = {"data": {"name": str(tmp_path / "flowers"), "image_size": 8, "channels": 3}, "model": NIN}
    records = [{"stage": "train", "config": {"distill": str(tmp_path / "t.safetensors"), "epochs": 3}}]
    about = {"kind": "artifact", "file": "a.safetensors", "size_bytes": 1, "layers": [], **origin, "history": records}
    card = card_text(about)
    assert "micronet train --model nin --data flowers --epochs 3 --distill t.safetensors -o a.safetensors" in card
    assert str(tmp_path) not in card
    data = {"task": "t.py:T", "inputs": [{"shape": [3], "dtype": "float32"}]}
    own = {"data": data, "model": {**NIN, "name": "n.py:N"}}
    records.append({"stage": "quantize", "config": {"w_bits": 4}})
    card = card_text({**about, **own})
    assert "micronet train --model n.py:N --task t.py:T --epochs 3 --distill t.safetensors -o 1-train.saf" in card
    assert "quantize 1-train.safetensors --model n.py:N --task t.py:T --w-bits 4 -o a.safetensors" in card
    assert "micronet evaluate a.safetensors --model n.py:N --task t.py:T\n" in card
    assert "micronet compare FLOAT a.safetensors\n" in card_text(
        {**about, "data": {**own["data"], "task": "agreement"}}
    )
    records[:] = [None]
    records[0] = {"stage": "import", "config": {"model": "nin", "weights": str(tmp_path / "w.pth")}}
    assert "micronet import --model nin --data flowers --weights w.pth -o a.safetensors" in card_text(about)


HOSTILE = {
    "model": {"name": EVIL, "args": {EVIL: EVIL}},
    "data": {"name": EVIL, "classes": [EVIL] * 40, "image_size": 8},
    "history": [
        {"stage": EVIL, "config": {EVIL: EVIL}, "result": {}},
        {"stage": "quantize", "config": {"w_bits": EVIL, "epochs": EVIL}, "result": {"left_float": {EVIL: EVIL}}},
    ],
    "metrics": {EVIL: EVIL, "test_images": EVIL},
    "versions": {EVIL: EVIL},
}


def test_what_a_hostile_header_says_is_code_and_nothing_else(micronet, chain, tmp_path):
    header, _ = read_header(chain / "float.safetensors")
    path = tmp_path / "a.safetensors"
    from safetensors.numpy import save

    path.write_bytes(b"".join(seal(save({}, {KEY: json.dumps({**header.to_json(), **HOSTILE})}))))
    proto = onnx.load(chain / "float.onnx")
    helper.set_model_props(proto, {"micronet": json.dumps(HOSTILE)})
    onnx.save(proto, tmp_path / "a.onnx")
    for name in ("a.safetensors", "a.onnx"):
        done = micronet("card", tmp_path / name)
        assert done.code == 0, done.err
        left = spans_removed(done.out)
        assert "evil" in done.out and not {"evil", "script", "Title"} & set(re.findall(r"\w+", left))
        assert not {"\x1b", "\u202e"} & set(done.out)
        headings = [line for line in left.splitlines() if line.startswith("#")]
        known = ("# ", "## Use", "## Data", "## How it was made", "## Metrics", "## Sizes", "## Limits", "## Licence")
        assert set(headings) <= set(known) and len(headings) == len(set(headings)) >= 7


@pytest.mark.parametrize("name", ["a.pth", "none.onnx"])
def test_other_files_are_one_line(micronet, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()
    done = micronet("card", name, "-o", "card.md")
    assert (done.code, done.err.count("\n")) == (2, 1) and not (tmp_path / "card.md").exists()
