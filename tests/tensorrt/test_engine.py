import hashlib
import importlib
import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest

from micronet.errors import MicronetError
from micronet.onnx.reader import read_onnx
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.runtimes.onnxruntime import metadata
from micronet.runtimes.tensorrt.engine import CACHED_SHAPES, EnginePredictor
from micronet.runtimes.tensorrt.library import library, logger
from tests.tensorrt.fake_gpu import COMPUTE, MS_PER_IMAGE, Gpu, class_scores, write_engine

METADATA = {"data": {"name": "digits", "mean": [0.5], "std": [0.25]}, "history": [{"stage": "train"}]}


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def opened(path):
    return EnginePredictor(path, RuntimeOptions())


@pytest.mark.parametrize("count", [1, 4, 8, 9, 21])
def test_scores_of_any_batch_are_what_the_engine_computes(gpu, tmp_path, count):
    engine = opened(write_engine(tmp_path / "net.engine", (2, 3, 8, 8), (8, 3, 8, 8)))  # 1 is filled up, 9 cut
    batch = images(count, 3, 8, 8)
    scores = engine(batch)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, class_scores(batch))
    channels_last = batch.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(engine(channels_last), scores)


def test_memory_is_allocated_once_a_shape(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (4, 3, 8, 8)))
    first = engine(images(4, 3, 8, 8))
    kept = first.copy()
    for count in (4, 2, 4, 2, 4):
        engine(images(count, 3, 8, 8) + count)
    assert gpu.allocations == 2 * 2  # an input and an output for each of two shapes
    np.testing.assert_array_equal(first, kept)  # what was returned is not what the next call writes into


def test_memory_is_bounded_whatever_shapes_come(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (16, 3, 8, 8)))
    for count in [*range(1, 17), 1]:  # the last shape's memory was freed long ago
        batch = images(count, 3, 8, 8)
        np.testing.assert_array_equal(engine(batch), class_scores(batch))
        assert len(gpu.memory) <= 2 * CACHED_SHAPES
    assert gpu.allocations == 2 * 17


def test_the_shapes_used_last_stay_in_memory(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (16, 3, 8, 8)))
    for count in range(2, 12):
        for size in (1, count):  # 1 is used again and again
            engine(images(size, 3, 8, 8))
    assert gpu.allocations == 2 * 11


def test_a_batch_below_the_smallest_is_filled_up_with_zeros(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (4, 3, 8, 8)))
    batch = images(6, 3, 8, 8)
    assert len(engine(batch)) == 6
    np.testing.assert_array_equal(np.concatenate(gpu.runs), np.concatenate([batch, np.zeros((2, 3, 8, 8))]))


def test_after_a_failure_the_shape_before_it_still_runs(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (4, 3, 8, 8)))
    batch = images(2, 3, 8, 8)
    engine(batch)
    gpu.broken = "cuMemAlloc failed: out of memory"
    with pytest.raises(MicronetError):
        engine(images(4, 3, 8, 8))
    np.testing.assert_array_equal(engine(batch), class_scores(batch))


def test_half_in_and_out_come_as_float32(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (4, 3, 8, 8), kind="HALF", out="HALF"))
    batch = images(4, 3, 8, 8)
    scores = engine(batch)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, class_scores(batch.astype(np.float16)).astype(np.float16))


def test_a_network_that_normalises_by_itself_gets_pixels(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (2, 1, 8, 8), kind="UINT8", metadata=METADATA))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8)).astype(np.uint8)
    normalised = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    np.testing.assert_array_equal(engine(normalised), class_scores(pixels))


def test_every_shape_is_run_in_the_profile_that_holds_it(gpu, tmp_path):
    profiles = [((1, 3, 8, 8), (4, 3, 16, 16)), ((1, 3, 32, 32), (2, 3, 64, 48)), ((8, 3, 8, 8), (16, 3, 16, 16))]
    engine = opened(write_engine(tmp_path / "net.engine", (), profiles=profiles))
    for shape in [(3, 3, 8, 16), (2, 3, 64, 48), (5, 3, 40, 32), (3, 3, 8, 16), (12, 3, 9, 9), (6, 3, 8, 8)]:
        batch = images(*shape)
        np.testing.assert_array_equal(engine(batch), class_scores(batch))
    assert [len(run) for run in gpu.runs] == [3, 2, 2, 2, 1, 3, 12, 8]  # 5 cut into twos, 6 filled up to 8


@pytest.mark.parametrize("shape", [(1, 3, 20, 20), (1, 1, 8, 8), (1, 3, 8)])
def test_a_shape_outside_every_profile_names_their_ranges(gpu, tmp_path, shape):
    profiles = [((1, 3, 8, 8), (4, 3, 16, 16)), ((1, 3, 32, 32), (2, 3, 64, 48))]
    engine = opened(write_engine(tmp_path / "net.engine", (), profiles=profiles))
    with pytest.raises(MicronetError, match="1x3x8x8 to 4x3x16x16 or 1x3x32x32 to 2x3x64x48, but got 1x") as caught:
        engine(images(*shape))
    assert caught.value.exit_code == 2


def test_device_time_is_that_between_the_events(gpu, tmp_path):
    engine = opened(write_engine(tmp_path / "net.engine", (1, 3, 8, 8), (8, 3, 8, 8)))
    assert engine.device_ms(images(8, 3, 8, 8)) == 8 * MS_PER_IMAGE
    assert engine.device_ms(images(20, 3, 8, 8)) == 20 * MS_PER_IMAGE  # in three parts


def test_an_engine_tells_what_it_is(gpu, tmp_path):
    path = write_engine(tmp_path / "net.engine", (1, 1, 8, 8), metadata=METADATA, params=7)
    network = open_network(path, RuntimeOptions())
    assert (network.runtime, network.stages, network.params) == ("tensorrt", ["train"], 7)
    assert network.data.name == "digits"
    assert network.macs((1, 8, 8)) is None
    assert opened(write_engine(path, (1, 1, 8, 8))).data is None


def _without_json(path, gpu, monkeypatch):
    path.with_name("net.engine.json").unlink()


def _says(**about):
    def spoil(path, *_):
        beside = path.with_name(f"{path.name}.json")
        beside.write_text(json.dumps({**json.loads(beside.read_text()), **about}))

    return spoil


def _damaged_json(path, gpu, monkeypatch):
    path.with_name("net.engine.json").write_text('{"backend": "tens')


def _exchanged(path, gpu, monkeypatch):
    path.write_bytes(path.read_bytes() + b" ")


def _of_another_version(path, gpu, monkeypatch):
    gpu.trt.__version__ = "11.0"


def _without_tensorrt(path, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # which is how an import is made to find nothing


def _without_pycuda(path, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)


def _without_driver(path, gpu, monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *rest):
            if name == "pycuda.driver":
                raise ImportError("libcuda.so.1: cannot open shared object file")

    gpu_package = ModuleType("pycuda")
    gpu_package.__path__ = []
    monkeypatch.setitem(sys.modules, "pycuda", gpu_package)
    monkeypatch.delitem(sys.modules, "pycuda.driver")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


def _without_gpu(path, gpu, monkeypatch):
    def init():
        raise gpu.cuda.Error("cuInit failed: no CUDA-capable device is detected")

    gpu.cuda.init = init


def _with_no_gpu_visible(path, gpu, monkeypatch):
    gpu.count = 0


def _of_another_kind(path, gpu, monkeypatch):
    write_engine(path, (1, 3, 8, 8), out="BF16")


def _with_nonsense(path, gpu, monkeypatch):
    about = json.loads(path.with_name("net.engine.json").read_text())
    path.write_bytes(b"nonsense")
    about["engine_sha256"] = hashlib.sha256(b"nonsense").hexdigest()
    path.with_name("net.engine.json").write_text(json.dumps(about))


def _with_little_memory(path, gpu, monkeypatch):
    gpu.broken = "cuMemAlloc failed: out of memory"


def _with_failing_runs(path, gpu, monkeypatch):
    gpu.fails = True


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda path, *_: path.unlink(), 2, "does not exist; create it with micronet trt-build"),
        (_without_json, 2, "needs its description net.engine.json"),
        (_damaged_json, 2, "net.engine.json is corrupted"),
        *((_says(metadata=value), 2, "net.engine.json is corrupted") for value in (3, {"data": 3}, {"history": [1]})),
        (_says(params=[]), 2, "net.engine.json is corrupted"),
        (_exchanged, 2, "corrupted or was replaced"),
        (_of_another_kind, 2, "output is BF16"),
        (_of_another_version, 1, "tensorrt 10.99.0.1, but 11.0 is installed"),
        (_without_tensorrt, 1, "pip install tensorrt"),
        (_without_pycuda, 1, "pip install pycuda"),
        (_without_driver, 1, "no NVIDIA driver found on this machine .libcuda"),
        (_without_gpu, 1, "no NVIDIA GPU found on this machine .cuInit"),
        (_with_no_gpu_visible, 1, "no NVIDIA GPU found on this machine"),
        (
            _with_nonsense,
            1,
            "cannot be opened; if it was built for another GPU, build it again with micronet trt-build .magic tag",
        ),
        (_with_little_memory, 1, "out of memory"),
        (_with_failing_runs, 1, "running the engine failed .an illegal memory access"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_ends_in_one_line(gpu, tmp_path, monkeypatch, spoil, code, words):
    path = write_engine(tmp_path / "net.engine", (1, 3, 8, 8))
    spoil(path, gpu, monkeypatch)
    with pytest.raises(MicronetError, match=words) as caught:
        opened(path)(images(1, 3, 8, 8))
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "cuda:x", "tpu"])
def test_only_gpus_that_are_there_can_be_asked_for(gpu, tmp_path, device):
    with pytest.raises(MicronetError, match=f"--device (is )?{device}") as caught:
        EnginePredictor(write_engine(tmp_path / "net.engine", (1, 3, 8, 8)), RuntimeOptions(device=device))
    assert caught.value.exit_code == 2


def test_the_gpu_asked_for_is_entered_once(monkeypatch, tmp_path):
    gpu = Gpu(count=2).install(monkeypatch)
    path = write_engine(tmp_path / "net.engine", (1, 3, 8, 8))
    for _ in range(2):
        assert EnginePredictor(path, RuntimeOptions(device="cuda:1")).gpu == "Fake 1"
    assert gpu.contexts == [1]


def test_without_either_library_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MicronetError, match=r"pip install tensorrt-rtx-cu13 \(can build without a GPU\)"):
        library("auto")
    with pytest.raises(MicronetError, match="unknown backend"):
        library("cudnn")


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_the_real_library_has_every_name_that_is_used(rtx):
    used = {
        rtx.ICudaEngine: "create_execution_context get_tensor_dtype get_tensor_mode get_tensor_name get_tensor_shape "
        "get_tensor_profile_shape num_io_tensors num_optimization_profiles",
        rtx.IExecutionContext: "active_optimization_profile execute_async_v3 get_tensor_shape set_input_shape "
        "set_optimization_profile_async set_tensor_address",
        rtx.Runtime: "deserialize_cuda_engine",
        rtx.TensorIOMode: "INPUT OUTPUT",
        rtx.ILogger: "INTERNAL_ERROR ERROR WARNING log",
    }
    for owner, names in used.items():
        assert not set(names.split()) - set(dir(owner))
    assert rtx.nptype(rtx.DataType.HALF) is np.float16
    assert rtx.nptype(rtx.DataType.UINT8) is np.uint8
    with pytest.raises(TypeError):
        rtx.nptype(rtx.DataType.BF16)


def test_the_real_library_refuses_what_is_no_engine(rtx, gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    path = write_engine(tmp_path / "net.engine", (1, 3, 8, 8), backend="tensorrt-rtx", version=rtx.__version__)
    with pytest.raises(
        MicronetError,
        match=r"cannot be opened; if it was built for another GPU, build it again with micronet trt-build \(.+\)",
    ) as caught:
        opened(path)
    assert caught.value.exit_code == 1
    assert logger(rtx) is logger(rtx)
    logger(rtx).clear()
    assert logger(rtx).errors == []


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed here")
def test_without_pycuda_the_command_ends_in_one_line(rtx, micronet, tmp_path):
    path = write_engine(tmp_path / "net.engine", (1, 3, 8, 8), backend="tensorrt-rtx", version=rtx.__version__)
    for command in ("trt-eval", "evaluate"):
        done = micronet(command, path)
        assert done.code == 1
        assert done.err.count("\n") == 1 and "pip install pycuda" in done.err


@pytest.fixture
def exported(gpu, chain, tmp_path, monkeypatch):
    """An engine that computes what ``float.onnx`` does, by the same session, with the same metadata."""
    from micronet.runtimes.onnxruntime import OrtPredictor

    session = OrtPredictor(chain / "float.onnx", RuntimeOptions())
    monkeypatch.setitem(COMPUTE, "onnx", lambda batch: session(batch.astype(np.float32)))
    shape = (session.data.channels, session.data.image_size, session.data.image_size)
    about = metadata(read_onnx(chain / "float.onnx"))
    return write_engine(
        tmp_path / "net.engine", (1, *shape), (16, *shape), compute="onnx", metadata=about, params=session.params
    )


def test_trt_eval_agrees_with_the_onnx_file(exported, chain, micronet):
    done = micronet(
        "trt-eval", exported, "--onnx", chain / "float.onnx", "--batch-sizes", "1,40", "--limit", "64", "--json"
    )
    plain = micronet("evaluate", chain / "float.onnx", "--limit", "64", "--json")
    figures = done.json
    assert figures["agreement"] == 1
    assert figures["accuracy"] == figures["onnx_accuracy"] == plain.json["accuracy"]
    assert figures["images"] == 64
    assert figures["machine"]["gpu"] == "Fake 0"
    assert [each["shape"][0] for each in figures["timings"]] == [1, 40]
    for each in figures["timings"]:
        assert each["device_ms"] == MS_PER_IMAGE * each["shape"][0]
        assert each["p50_ms"] <= each["p95_ms"] <= each["p99_ms"]
        assert each["images_per_second"] == pytest.approx(1000 * each["shape"][0] / each["p50_ms"])


def test_trt_eval_prints_for_people(exported, chain, micronet):
    done = micronet("trt-eval", exported, "--onnx", chain / "float.onnx", "--batch-sizes", "2", "--limit", "32")
    assert done.code == 0, done.err
    for words in ("tensorrt 10.99.0.1, fp32", "Fake 0", "of 32 images", "agreement with ONNX 100.00%", "0.50 ms"):
        assert words in done.out


def test_evaluate_takes_an_engine(exported, micronet):
    done = micronet("evaluate", exported, "--limit", "32", "--json")
    assert done.json["runtime"] == "tensorrt"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-sizes", "1,x"], "--batch-sizes is '1,x'"),
        (["--batch-sizes", "0"], "--batch-sizes is '0'"),
        (["--sizes", "32"], "--sizes only applies to --segmentation"),
        (["--segmentation", ".", "--data", "digits"], "cannot be combined with --data"),
        (["--segmentation", ".", "--sizes", "3x"], "--sizes is '3x'"),
        (["--onnx", "none.onnx"], "none.onnx does not exist"),
        (["--onnx", "float.safetensors"], "expected an .onnx file"),
    ],
)
def test_trt_eval_refuses_what_it_cannot_do(exported, micronet, options, words):
    done = micronet("trt-eval", exported, *options)
    assert done.code == 2
    assert words in done.err


def test_trt_eval_sends_other_networks_to_evaluate(chain, micronet):
    done = micronet("trt-eval", chain / "float.onnx")
    assert done.code == 2 and "float.onnx is an ONNX file; expected a TensorRT engine" in done.err
    assert "micronet evaluate" in done.err


def _gpu_present():
    try:
        cuda = importlib.import_module("pycuda.driver")
        cuda.init()
        library("auto")
        return cuda.Device.count() > 0
    except Exception:
        return False


@pytest.mark.skipif(not _gpu_present(), reason="needs an NVIDIA GPU, pycuda and TensorRT or TensorRT-RTX")
def test_a_real_engine_agrees_with_its_onnx_file(chain, tmp_path, micronet):
    assert micronet("trt-build", chain / "float.onnx", "-o", tmp_path / "real.engine").code == 0
    done = micronet("trt-eval", tmp_path / "real.engine", "--onnx", chain / "float.onnx", "--limit", "64", "--json")
    assert done.json["agreement"] > 0.9  # TF32 may turn a near tie
    assert all(each["device_ms"] < each["p50_ms"] for each in done.json["timings"])
