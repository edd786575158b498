"""Reading the tensors of a torch checkpoint without unpickling it, whatever objects lie beside them.

The pickle's instructions, of any protocol, are followed by hand: nothing that the file names is looked up, imported or
called. Tensors, numbers, text and containers are read; every other object becomes ``Unread``, which knows its class.
"""

import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
_EMPTY: Mapping[str, Any] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_GROUPS = {"LIST": list, "TUPLE": tuple, "FROZENSET": list}
_FEW = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = {"collections.OrderedDict", "collections.defaultdict"}


class _Name(NamedTuple):
    """A class or function that a file names."""

    name: str


class _Storage(NamedTuple):
    """Numbers that a file holds as a member, of a type of torch's."""

    kind: str
    key: str


class Unread(OrderedDict[Any, Any]):
    """An object of a class that is not read, with its items if it is a dict."""

    name = ""


def read_checkpoint(path: Path) -> Any:
    """Return what a zip file of ``torch.save`` holds. Raises ValueError, or what a damaged file makes fail."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written by a big-endian machine")
        return _Machine(archive, folder).run(archive.read(pickles[0]))


class _Machine:
    """Follows the instructions of one pickle."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[_Storage, Tensor] = {}

    def run(self, data: bytes) -> Any:
        """Return what the pickle describes."""
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, arg)
        raise ValueError("it ends early")

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NUMBERS or "UNICODE" in name or "STRING" in name or "BYTE" in name:
            stack.append(arg)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _GROUPS:
            self._push(_GROUPS[name](self._since_mark()))
        elif name in _FEW:
            stack[-_FEW[name] :] = [tuple(stack[-_FEW[name] :])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if arg is None else arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name not in ("PROTO", "FRAME"):
            self._make(name, arg)

    def _fill(self, name: str) -> None:
        """Put items into a container; those of objects that are not read are left out, unless they are a dict's."""
        items = self._since_mark() if name.endswith("S") else [self._stack.pop() for _ in range(1 + ("SET" in name))]
        owner = self._stack[-1]
        if not name.endswith("S"):
            items.reverse()
        if "SETITEM" in name and isinstance(owner, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            owner.update((key, value) for key, value in pairs if isinstance(key, (str, int, float, bytes)))
        elif isinstance(owner, list):
            owner.extend(items)

    def _make(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name == "GLOBAL":
            stack.append(_Name(arg.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()
            args, maker = stack.pop(), stack.pop()
            stack.append(self._made(maker, args))
        elif name == "BUILD":
            stack.pop()  # the state of an object
        elif name == "BINPERSID":
            _, kind, key, *_ = stack.pop()
            stack.append(_Storage(kind.name.rpartition(".")[2], str(key)))
        else:
            raise ValueError(f"it has an instruction {name}")

    def _made(self, maker: Any, args: Any) -> Any:
        """Return a tensor or a dict; anything else is not read."""
        name = maker.name if isinstance(maker, _Name) else ""
        if name == "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride, *_ = args
            return self._numbers(storage).as_strided(size, stride, offset)  # which checks that it has them
        if name == "torch._utils._rebuild_parameter":
            return args[0]
        made: Any = OrderedDict() if name in _PLAIN else Unread()
        if isinstance(made, Unread):
            made.name = name
        return made

    def _numbers(self, storage: _Storage) -> Tensor:
        """Return the numbers of a storage, which tensors may share."""
        if storage not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}data/{storage.key}"))
            dtype = _STORAGES[storage.kind]
            self._storages[storage] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[storage]

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)
