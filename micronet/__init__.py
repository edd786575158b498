"""micronet: make neural networks small and fast, and deploy them.

Every function takes a network as a file, an ``Artifact`` or a plain ``torch.nn.Module`` and returns what it made::

    net = micronet.import_model(model="net.py:Net", weights="net.pth", data="path/to/images")
    pruned = micronet.prune(net, percent=0.5, criterion="l2")
    int8 = micronet.quantize(pruned, mode="ptq")
    micronet.export_onnx(int8, output="int8.onnx")
    rows = micronet.compare([net, int8, "int8.onnx"])

Nothing is written unless ``output`` names a file. ``train`` explains the keywords of all functions that train.

A mistake in a call, an input or the order of stages raises ``MicronetError``, whose message says what to change. Its
subclasses are ``FailedError``, if the work itself failed (the loss became NaN, an exported file does not agree with
torch, a limit such as ``max_drop`` is exceeded), and ``StoppedError``, if ``max_time`` has passed.

For a training loop of your own: ``quantize`` without data places the quantizers, ``calibrate`` and ``observing`` set
their ranges, ``freeze`` keeps them.
"""

# Nothing that takes time is imported here: the command starts with this file, and would show a traceback if Ctrl-C came
# before it is ready.
import os as _os

_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # or ONNX Runtime reports models' names and hashes to its maker
_HOMES = {
    "Artifact": "micronet.artifact.artifact",
    "FailedError": "micronet.errors",
    "MicronetError": "micronet.errors",
    "StoppedError": "micronet.errors",
    "calibrate": "micronet.quantization.calibrate",
    "freeze": "micronet.quantization.calibrate",
    "load": "micronet.stages.api",
    "observing": "micronet.quantization.calibrate",
    "save": "micronet.stages.api",
}


def __getattr__(name: str) -> object:  # at the first use, so that ``micronet --help`` needs no torch
    from importlib import import_module

    from micronet.registry import API

    if name == "__all__":
        value: object = __dir__()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in API:
        value = import_module("micronet.stages.api").function(name)
    else:
        names = {command.replace("-", "_"): own for own, command in API.items()}
        hint = f"; did you mean {names[name]!r}?" if name in names else ""
        raise AttributeError(f"module 'micronet' has no attribute {name!r}{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from micronet.registry import API

    return sorted([*_HOMES, *API])
