import json
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import micronet
from micronet.artifact.artifact import Artifact, load, save
from micronet.artifact.header import StageRecord, read_header
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec, build_model
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model
from micronet.training.config import RunContext, TrainConfig
from micronet.training.distillation import load_teacher

IMAGES = torch.randn(8, 3, 32, 32)
NETWORKS = [("nin", {"width": 0.1}), ("nin_gc", {"width": 0.1}), ("resnet18", {"width": 0.1}),
            ("torchvision:resnet18", {"num_classes": 7})]  # fmt: skip
CHAINS = [(), ("fuse",), ("quantize",), ("quantize", "fuse"), ("fuse", "quantize")]
SETTINGS = [("channel", "sym"), ("channel", "asym"), ("layer", "sym"), ("layer", "asym")]
# Every network through every chain, every quantized chain with all settings; torchvision's large network once.
CASES = [
    *((0, chain, *setting) for chain in CHAINS for setting in SETTINGS if "quantize" in chain),
    *((network, chain, *SETTINGS[(network + place) % 4]) for network in (1, 2) for place, chain in enumerate(CHAINS)),
    *((0, chain, "channel", "sym") for chain in CHAINS[:2]),
    (3, CHAINS[3], "layer", "asym"),
]


def through(model, chain, **config):
    """Put a float model through stages; return it with its records."""
    records = [StageRecord("train")]
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(IMAGES)
    model.eval()
    for stage in chain:
        if stage == "quantize":
            model, record = quantize_model(model, QuantConfig(**config))
            calibrate(model, [IMAGES])
        else:
            model, record = fold_model(model)
        records.append(record)
    return model.eval(), records


@pytest.mark.parametrize(("network", "chain", "q_level", "q_type"), CASES)
def test_save_and_load_is_bit_exact(tmp_path, network, chain, q_level, q_type):
    spec = ModelSpec(*NETWORKS[network])
    model, records = through(build_model(spec), chain, q_type=q_type, q_level=q_level)
    path = tmp_path / "a.safetensors"
    save(Artifact(model, spec, records, {"accuracy": 0.5}, None, 3), path)
    again = load(path)
    assert again.history == records
    assert (again.metrics, again.seed) == ({"accuracy": 0.5}, 3)
    for (name, left), (other, right) in zip(model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(left, right), name
    with torch.no_grad():
        assert torch.equal(model(IMAGES), again.model.eval()(IMAGES))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    spec = ModelSpec("nin", {"width": 0.1})
    artifact = Artifact(build_model(spec), spec, [StageRecord("train")])
    for name in ("a", "b"):
        save(artifact, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model, path = Tied(), tmp_path / "tied.safetensors"
    save(Artifact(model, ModelSpec("tied.py:Tied"), [StageRecord("import")]), path)
    header, table = read_header(path)
    assert header.tied == {"second.weight": "first.weight"}
    assert len(table.tensors) == 3
    again = load(path, Tied()).model
    assert again.second.weight is again.first.weight
    assert torch.equal(again.first.weight, model.first.weight)


NETWORKS_OF_A_USER = """from torch import nn
class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
class Other(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 1))
"""


def test_a_class_in_place_of_a_network_is_refused(chain):
    with pytest.raises(MicronetError, match=r"model is the class Conv2d; pass a network, Conv2d\(\.\.\.\)"):
        load(chain / "float.safetensors", nn.Conv2d)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("net.py:Other", "builds a different network"),
        ("net.py", "unknown model 'net.py'"),
        ("net.py:Ne", "unknown factory"),
        ("nin", "builds a different network"),
        ("net.py:Net", None),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_network_can_be_built_again(tmp_path, monkeypatch, build, message, fused):
    (tmp_path / "net.py").write_text(NETWORKS_OF_A_USER)
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    network = micronet.fuse(network) if fused else network
    path, state = tmp_path / "a.safetensors", torch.get_rng_state()
    if message is None:
        micronet.save(network, path, build=build)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(list(micronet.load(path, "net.py:Net").model.parameters())) == (2 if fused else 4)
    else:
        with pytest.raises(MicronetError, match=message):
            micronet.save(network, path, build=build)
        assert not path.exists()


def test_a_script_can_save_a_network_that_it_defines(tmp_path):
    """The script is not run again to check the network, even if it does not guard its main part."""
    script = tmp_path / "net.py"
    script.write_text(
        f"{NETWORKS_OF_A_USER}\nimport micronet\nprint('running')\n"
        "micronet.save(Net(6), 'a.safetensors', build='net.py:Net', args={'width': 6})\n"
        "micronet.save(Net(6), 'b.safetensors', build='net.py:Net')\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "running\n"
    assert "builds a different network" in done.stderr
    assert (tmp_path / "a.safetensors").exists()
    assert not (tmp_path / "b.safetensors").exists()


def _artifact(tmp_path):
    spec = ModelSpec("nin", {"width": 0.1})
    path = tmp_path / "good.safetensors"
    save(Artifact(build_model(spec), spec, [StageRecord("train")]), path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_error(tmp_path, share):
    path = _artifact(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(MicronetError, match=r"truncated|empty"):
        load(path)


def _with_header(path, change):
    """Rewrite an artifact's micronet header, without checksums."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    raw = json.loads(content[8 : 8 + length])
    value = json.loads(raw["__metadata__"]["micronet"])
    change(value)
    raw["__metadata__"] = {"micronet": json.dumps(value)}
    text = json.dumps(raw).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format=99), "pip install -U"),
        (lambda value: value.pop("history"), "corrupted"),
        (lambda value: value.update(history=[{"no": "stage"}]), "corrupted"),
        (lambda value: value.update(model={"name": "nope"}), "unknown model"),
        (lambda value: value.update(model={"name": "nin", "args": {"colour": 1}}), "could not be built with arguments"),
        (lambda value: value.update(model={"name": "nin", "args": {"in_channels": 0}}), "could not be built with"),
        (lambda value: value.update(model={"name": "nin", "args": {"width": 100.0}}), "its file is too small"),
        (lambda value: value.update(history=[{"stage": "bn-fuse", "config": {}, "result": {"pairs": [["a", "b"]]}}]),
         "does not match"),
        (lambda value: value.update(history=[{"stage": "bn-fuse", "config": {}, "result": {
            "recorded": [{"shape": [-1], "dtype": "float32"}], "pairs": []}}]), "does not match"),
        (lambda value: value.update(history=[{"stage": "bn-fuse", "config": {}, "result": {
            "recorded": [{"shape": [10**6, 3, 999, 999], "dtype": "float32"}], "pairs": []}}]), "more than"),
        (lambda value: value.update(history=[{"stage": "prune", "config": {}, "result": {
            "sizes": {}, "tensors": {"features.0.conv.weight": [10**9, 10**9, 3, 3]}}}]), "cannot be cut to"),
        (lambda value: value.update(history=[{"stage": "quantize", "config": {}, "result": {"quantizers": {
            "features.0.conv": {"weight_quantizer": {
                "scheme": "lsq", "bits": 2**64, "signed": True, "weight": True}}}}}]), "expected 1 to 17"),
        (lambda value: value.update(history=[{"stage": "quantize", "config": {}, "result": {
            "inputs": {"features.0.conv": "features.0.bn"}}}]), "is no quantizer"),
        (lambda value: value.update(history=[{"stage": "quantize", "config": {}, "result": {"quantizers": {
            "features.0.conv": {"weight_quantizer": {
                "scheme": "lsq", "bits": 8, "signed": True, "weight": True, "axis": 0, "channels": 2**31}}}}}]),
         "2147483648 channels"),
        (lambda value: value.update(model={"name": "nin", "args": {"width": 0.2}}), "do not match"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_one_clear_error(tmp_path, change, message):
    path = _artifact(tmp_path)
    _with_header(path, change)
    with pytest.raises(MicronetError, match=message):
        load(path)


@pytest.mark.parametrize(
    "raw",
    [{"__metadata__": 5}, {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}],
    ids=["text", "offsets"],
)
def test_hostile_metadata_is_one_clear_error(tmp_path, raw):
    text = json.dumps(raw).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(MicronetError, match="truncated"):
        load(tmp_path / "a.safetensors")


def test_other_files_are_named_for_what_they_are(tmp_path):
    pickle = tmp_path / "model.pth"
    torch.save({"state_dict": {}}, pickle)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for path, message in (
        (pickle, "micronet import"),
        (foreign, "micronet did not write"),
        (picture, "PNG image"),
        (tmp_path, "folder"),
        (tmp_path / "missing.safetensors", "does not exist"),
    ):
        with pytest.raises(MicronetError, match=message):
            load(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_escapes_as_another_exception(tmp_path, seed):
    path = _artifact(tmp_path)
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    length = struct.unpack("<Q", content[:8])[0]
    for position in torch.randint(8 + length, (5,), generator=generator).tolist():
        content[position] = int(torch.randint(256, (1,), generator=generator))
    path.write_bytes(bytes(content))
    with suppress(MicronetError):
        load(path)


def test_a_teachers_code_runs_if_it_is_the_students_or_trusted(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NETWORKS_OF_A_USER)
    (tmp_path / "other.py").write_text(NETWORKS_OF_A_USER + "# another file")
    monkeypatch.chdir(tmp_path)
    student = micronet.import_model(model="net.py:Net")
    for file in ("net", "other"):
        micronet.import_model(model=f"{file}.py:Other", output=f"{file}.safetensors")
    config, context = TrainConfig(distill=Path("other.safetensors")), RunContext(tmp_path, torch.device("cpu"))
    with pytest.raises(MicronetError, match=r"other.py:Other, which is not run automatically; add --trust-code"):
        load_teacher(config, student, DataSpec(), context)
    trusted = load_teacher(config, student, DataSpec(), replace(context, trust_code=True))
    own = load_teacher(TrainConfig(distill=Path("net.safetensors")), student, DataSpec(), context)
    assert isinstance(trusted.model[0], nn.Conv2d) and isinstance(own.model[0], nn.Conv2d)
