"""Reading the tensors of a torch checkpoint without unpickling it, whatever objects lie beside them.

The pickle's instructions, of any protocol, are followed by hand: nothing that the file names is looked up, imported or
called. Tensors, numbers, text and containers are read; every other object becomes ``Unread``, which knows its class.

Time and memory grow in proportion to the file. A few bytes can nest tuples so that one walk over them takes forever,
and repeat one number so often that no memory holds it. So nothing of a file is hashed, compared, formatted or iterated
before its type is known, and nothing computes with a tensor.
"""

import mmap
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from micronet.core.machine import available_memory

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4,
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in (  # without a storage of their own
    torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
_EMPTY: Mapping[str, Any] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_GROUPS = {"LIST": list, "TUPLE": tuple, "FROZENSET": list}
_FEW = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = {"collections.OrderedDict", "collections.defaultdict"}
_MAKE = "torch._utils._rebuild_"
_TENSORS = {_MAKE + what for what in ("tensor", "tensor_v2", "tensor_v3")}
_AROUND = {_MAKE + what for what in ("parameter", "parameter_with_state", "device_tensor_from_cpu_tensor")}
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # a tensor with attributes, or of a class of its own
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # begin a file of torch before 1.6
_MEMORY_PER_BYTE = 200  # of a pickle, at most; measured: one byte makes a dict, five a tensor


class CheckpointError(ValueError):
    """A file that is not read; the message says why."""


class _Name(NamedTuple):
    """A class or function that a file names."""

    name: str


class _Storage(NamedTuple):
    """Numbers that a file holds, of a type of torch's."""

    dtype: torch.dtype
    key: str
    length: int


class Unread(dict[Any, Any]):
    """An object of a class that is not read, or that an unknown function makes, with its items if it is a dict."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def read_checkpoint(path: Path) -> Any:
    """Return what a file of ``torch.save``, uncompressed, holds. Raises CheckpointError, or what damage makes fail."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _read_zip(file, content) if zipfile.is_zipfile(path) else _read_old(content)


def _read_zip(file: IO[bytes], content: mmap.mmap) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: each for each in archive.infolist()}

    def read(name: str) -> bytearray:
        """Return a member, whose checksum torch can leave out and does not look at."""
        member = members[name]
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26))
        with memoryview(content) as view, view[start : start + member.file_size] as part:
            return bytearray(part)

    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError("it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and read(f"{folder}byteorder") != b"little":
        raise CheckpointError("it was written by a big-endian machine")
    return _Machine(lambda storage: read(f"{folder}data/{storage.key}")).run(read(pickles[0]))


def _read_old(content: mmap.mmap) -> Any:
    """Read the format of torch before 1.6: five pickles, then the numbers that they are about."""
    held: dict[str, bytearray] = {}
    free = len(content)

    def reserve(storage: _Storage) -> bytearray:
        nonlocal free
        size = storage.length * storage.dtype.itemsize
        if not 0 <= size <= free:
            raise CheckpointError("it ends early")
        free -= size
        return held.setdefault(storage.key, bytearray(size))

    for expected in (_MAGIC, _PROTOCOL):
        if not isinstance(found := _Machine(reserve).run(content), int) or found != expected:
            raise CheckpointError("it is not a file of torch.save")
    system = _Machine(reserve).run(content)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it was written by a big-endian machine")
    machine = _Machine(reserve)
    made, keys = machine.run(content), _Machine(reserve).run(content)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not held.keys() <= set(keys):
        raise CheckpointError("it does not hold all of its numbers")
    for key in keys:
        size = struct.unpack("<q", content.read(8))[0] * machine.items[key]
        numbers = content.read(size) if 0 <= size <= len(content) else b""
        if len(numbers) != size or size != len(held.get(key, numbers)):
            raise CheckpointError("it ends early")
        held.get(key, bytearray())[:] = numbers
    return made


class _Machine:
    """Follows the instructions of one pickle. ``read``: returns the numbers of a storage."""

    def __init__(self, read: Callable[[_Storage], bytearray]) -> None:
        self._read = read
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._content: dict[str, bytearray] = {}
        self._numbers: dict[tuple[str, torch.dtype, bool], Tensor] = {}
        self.items: dict[str, int] = {}  # the bytes of one number, by storage

    def run(self, pickle: bytearray | mmap.mmap) -> Any:
        """Return what the pickle describes."""
        last = available_memory() // _MEMORY_PER_BYTE + (pickle.tell() if isinstance(pickle, mmap.mmap) else 0)
        for opcode, arg, position in pickletools.genops(pickle):  # type: ignore[arg-type]  # a file, or its content
            if opcode.name == "STOP":
                return self._stack.pop()
            if position is not None and position > last:
                raise CheckpointError("its objects need more memory than is free")
            self._step(opcode.name, arg)
        raise CheckpointError("it ends early")

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
            items = self._since_mark()
            self._stack.append(_GROUPS[name](items))
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
            owner.update((key, value) for key, value in pairs if _is_key(key))
        elif isinstance(owner, list):
            owner.extend(items)

    def _make(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in ("GLOBAL", "STACK_GLOBAL"):
            # names of any length, joined often, would fill memory
            parts = [arg] if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            if not all(isinstance(part, str) and len(part) < 1000 for part in parts):
                raise CheckpointError("it names a class by an object, or at length")
            stack.append(_Name(".".join(parts).replace(" ", ".")))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()
            args, maker = stack.pop(), stack.pop()
            stack.append(self._made(maker.name if isinstance(maker, (_Name, Unread)) else "unknown", args))
        elif name == "BUILD":
            stack.pop()  # the state of an object
        elif name == "BINPERSID":
            stack.append(self._storage(*_few(stack.pop())))
        else:
            raise CheckpointError(f"it has an instruction {name}")

    def _storage(self, what: Any, kind: Any, key: Any, *rest: Any) -> Any:
        """Return a storage; of a network of torch before 1.6, its class."""
        if not isinstance(kind, _Name) or not isinstance(what, str):
            raise CheckpointError("it names numbers by an object")
        if what != "storage":
            return kind
        dtype = _STORAGES.get(kind.name.rpartition(".")[2])
        if dtype is None or any(each is not None for each in rest[2:]):  # of a part of a storage
            raise CheckpointError(f"it has numbers of the type {kind.name}, or part of such, that are not read")
        if not isinstance(key, str) or not isinstance(rest[1], int):
            raise CheckpointError("it names numbers by an object")
        self.items[key] = dtype.itemsize
        return _Storage(dtype, key, rest[1])

    def _made(self, name: str, args: Any) -> Any:
        """Return a tensor or a dict; anything else is not read."""
        if name == _FROM_TYPE:
            maker, kind, args, _ = _few(args)
            if not isinstance(maker, _Name) or not isinstance(kind, _Name) or maker.name == _FROM_TYPE:
                raise CheckpointError("it has a tensor of an unknown class")
            name = maker.name if kind.name in _TYPES else kind.name  # another class may read its numbers differently
        if name in _TENSORS:
            return self._tensor(*_few(args))
        if name in _AROUND:
            return _few(args)[0]
        if name not in _PLAIN:
            return Unread(name)
        made: OrderedDict[Any, Any] = OrderedDict()
        if _few(args) and isinstance(args[0], list):  # of Python 2; the list is emptied, so none is read twice
            made.update((key, value) for key, value in map(_few, args[0]) if _is_key(key))
            args[0].clear()
        return made

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        """Return a tensor, as _rebuild_tensor_v2 makes it, or _v3, which has the type after ``rest``'s first two."""
        shape = (offset, *_few(size), *_few(stride))
        if not isinstance(storage, _Storage) or not all(isinstance(each, int) for each in shape):
            raise CheckpointError("it has a tensor without numbers or a shape")
        dtype, rest = storage.dtype, rest[2:]
        if rest and isinstance(rest[0], _Name):
            if rest[0].name not in _DTYPES:
                return Unread(rest[0].name)
            dtype, rest = _DTYPES[rest[0].name], rest[1:]
        signs = rest[0] if rest and rest[0] is not None else {}  # of numbers that torch has not negated yet
        if type(signs) is not dict or not signs.keys() <= {"conj", "neg"}:
            raise CheckpointError("it has a tensor with metadata that are not read")
        tensor = self._typed(storage, dtype, signs.get("neg") is True).as_strided(size, stride, offset)
        return tensor.conj() if signs.get("conj") is True else tensor

    def _typed(self, storage: _Storage, dtype: torch.dtype, negative: bool) -> Tensor:
        """Return the numbers of a storage, or their negatives, which tensors may share."""
        if storage.key not in self._content:
            self._content[storage.key] = self._read(storage)
        where, data = (storage.key, dtype, negative), self._content[storage.key]
        if where not in self._numbers:
            count = len(data) // dtype.itemsize
            numbers = torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            # private: torch has no public view of the negatives, and an old file's numbers are read after this
            self._numbers[where] = torch._neg_view(numbers) if negative else numbers
        return self._numbers[where]

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items


def _few(value: Any) -> Sequence[Any]:
    """Return the arguments of a call, or a pair; what else is iterated could take any length."""
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise CheckpointError("it has a call without arguments, or with many")
    return value


def _is_key(value: Any) -> bool:
    """Return whether a dict's item is read by its key: the hash of others takes long."""
    return isinstance(value, (str, bytes, float)) or (isinstance(value, int) and value.bit_length() <= 64)
