"""Build a TensorRT engine from an ONNX model, in one way for TensorRT 10, TensorRT 11 and TensorRT-RTX.

The network is strongly typed: the model's tensor types are the engine's. TensorRT 10 needs a flag for this; in later
versions every network is strongly typed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from micronet.core.files import write_bytes
from micronet.errors import FailedError, MicronetError
from micronet.runtimes.tensorrt.config import GIB, BuildConfig, Profile
from micronet.runtimes.tensorrt.library import backend_of, library, logger

_LAYER = re.compile(r"^Name: (?P<name>[^,]*), LayerType: (?P<kind>\w+), Inputs: (?P<rest>.*)$", re.MULTILINE)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_FROM = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
MULTIPLIES = ("correlation", "gemm", "deconv", "conv", "convolution")  # kinds of layers with weights


class Engine(NamedTuple):
    """A serialized engine and its description, a JSON object."""

    data: bytes
    about: dict[str, Any]


def build_engine(proto: onnx.ModelProto, profiles: Sequence[Profile], config: BuildConfig) -> Engine:
    """Build an engine of a model with one input; ``profiles``: shapes of the input, none if its shape is fixed.

    Raises:
        MicronetError: The model cannot be parsed, or a profile does not fit its input.
        FailedError: The library is not installed, or the build fails.
    """
    trt = library(config.backend)
    log = logger(trt)
    log.clear()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    _parse(trt, network, proto, log)
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(config.workspace * GIB))
    settings.builder_optimization_level = config.optimization_level
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log then lists the datatypes of every layer
    _add_profiles(builder, settings, network, profiles)
    _choose_gpus(trt, settings, config.compute_capability)
    cache = _read_timings(trt, settings, config.timing_cache)
    built = builder.build_serialized_network(network, settings)
    if built is None:
        raise FailedError(f"{backend_of(trt)} could not build the engine: {_last_error(log)}")
    if cache is not None and config.timing_cache is not None:
        write_bytes(config.timing_cache, bytes(settings.get_timing_cache().serialize()))
    name = network.get_input(0).name
    about = {
        "backend": backend_of(trt),
        "version": trt.__version__,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "profiles": [[{name: list(shape)} for shape in profile] for profile in profiles],
        "layers": layers(log.layers),
    }
    return Engine(bytes(built), about)


def layers(log: str) -> list[dict[str, Any]]:
    """Parse the layers of an engine from the builder's detailed log.

    Returns:
        Per layer, its ``name``, ``kind``, the datatypes of its ``inputs``, ``constants`` and ``outputs``, and the names
        of the ONNX nodes it was made ``from``.
    """
    found = []
    for match in _LAYER.finditer(log):
        inputs, _, rest = match["rest"].partition(", Constants: ")
        constants, _, rest = rest.partition(", Outputs: ")
        outputs, _, rest = rest.partition(", TacticName: ")
        tensors = {"inputs": inputs, "constants": constants, "outputs": outputs}
        types = {side: _DATATYPE.findall(text) for side, text in tensors.items()}
        found.append({"name": match["name"], "kind": match["kind"], **types, "from": _FROM.findall(rest)})
    return found


def datatypes(about: dict[str, Any]) -> dict[str, int]:
    """Count the layers with weights by the datatype of their input; it proves whether int8 is used."""
    reads = [layer["inputs"][0] for layer in about["layers"] if layer["kind"] in MULTIPLIES and layer["inputs"]]
    return dict(Counter(reads))


def _parse(trt: Any, network: Any, proto: onnx.ModelProto, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = "; ".join(_parser_error(error) for error in errors[:3]) or _last_error(log)
        raise MicronetError(
            f"{backend_of(trt)} cannot parse this model: {reason}; run micronet check-onnx to find out why"
        )
    if not network.num_layers or not network.num_outputs:
        raise MicronetError(
            f"{backend_of(trt)} found nothing to compute in this model; check it with micronet check-onnx"
        )
    if network.num_inputs != 1:
        raise MicronetError(
            f"the model has {network.num_inputs} inputs, but engines are only built for models of one; run the file "
            "with ONNX Runtime or OpenVINO, or build the engine with trtexec"
        )


def _parser_error(error: Any) -> str:
    description = error.desc()
    reason = f" ({description})" if description and description != "false" else ""
    return f"{error.node_operator() or 'a node'} {error.node_name()!r} is not supported{reason}"


def _add_profiles(builder: Any, settings: Any, network: Any, profiles: Sequence[Profile]) -> None:
    entry = network.get_input(0)
    axes = tuple(entry.shape)
    if -1 in axes and not profiles:
        raise MicronetError(
            f"the model's input has the dynamic shape {_size(axes)}; specify its sizes with --min-shape, --opt-shape "
            "and --max-shape"
        )
    for profile in profiles:
        for shape in profile:
            if len(shape) != len(axes) or any(axis not in (-1, size) for axis, size in zip(axes, shape, strict=True)):
                raise MicronetError(f"the shape {_size(shape)} does not match the model's input {_size(axes)}")
        if -1 in axes:
            created = builder.create_optimization_profile()
            created.set_shape(entry.name, *profile)
            if settings.add_optimization_profile(created) < 0:
                raise MicronetError(
                    f"TensorRT rejected the profile {' to '.join(map(_size, profile))}; choose other shapes"
                )


def _choose_gpus(trt: Any, settings: Any, capability: str | None) -> None:
    if capability is None:
        return
    if not hasattr(settings, "set_compute_capability"):
        raise MicronetError(
            f"{backend_of(trt)} only builds engines for the GPU in this machine; drop --compute-capability"
        )
    capabilities = [part.strip() for part in capability.split(",")]
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    settings.num_compute_capabilities = len(capabilities)
    for index, part in enumerate(capabilities):
        name = f"SM{part.replace('.', '')}"
        if name not in known:
            numbers = ", ".join(f"{key[2:-1]}.{key[-1]}" for key in sorted(known, key=lambda key: int(key[2:])))
            raise MicronetError(f"--compute-capability is {part}; {backend_of(trt)} supports {numbers}")
        settings.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _read_timings(trt: Any, settings: Any, path: Path | None) -> Any:
    if path is None:
        return None
    if backend_of(trt) == "tensorrt-rtx":
        raise MicronetError("TensorRT-RTX selects kernels at run time and has no timing cache; drop --timing-cache")
    cache = settings.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not settings.set_timing_cache(cache, False):
        raise MicronetError(f"{path} is not a timing cache for this TensorRT version and GPU; remove it")
    return cache


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).rpartition(".")[2].lower()}


def _size(shape: Sequence[int]) -> str:
    return "x".join("?" if size == -1 else str(size) for size in shape)


def _last_error(log: Any) -> str:
    return str(log.errors[-1]) if log.errors else "no reason was reported"
