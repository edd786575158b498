"""The JSON header of an artifact file, read without torch and without loading tensors.

An artifact is a safetensors file (https://huggingface.co/docs/safetensors): the header's length in eight bytes, a JSON
header, then raw tensors. Its metadata holds the JSON of ``Header``, under ``micronet``, and the checksums that
``core/tensor_file.py`` describes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from micronet.core.config import accepts
from micronet.core.parse import make_record
from micronet.core.tensor_file import Table, read_table
from micronet.data.spec import DataSpec
from micronet.errors import MicronetError
from micronet.models.spec import ModelSpec

FORMAT = 1
KEY = "micronet"
_IMPORT = "(import it with: micronet import --model NAME --weights {path})"
# A file's first bytes -> what it seems to be.
_SIGNATURES = {
    b"PK\x03\x04": f"a PyTorch or zip file {_IMPORT}",
    b"\x80": f"a pickle {_IMPORT}",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8": "a JPEG image",
    b"\x08": "an ONNX file",
}


Slots = dict[str, dict[str, Any]]  # the quantizers of one layer: slot -> description


@dataclass(frozen=True)
class StageRecord:
    """One stage that a model went through, in JSON values only."""

    stage: str
    config: dict[str, Any] = field(default_factory=dict)  # its settings
    result: dict[str, Any] = field(default_factory=dict)  # the structure, enough to rebuild the network without data

    @property
    def quantizers(self) -> dict[str, Slots]:
        """The quantizers that it placed, by layer; raises MicronetError if the record is damaged."""
        found = self._typed("quantizers", dict[str, dict[str, Any]])
        # bn-fuse records only the weight's quantizer
        layers = {name: {"weight_quantizer": each} if "scheme" in each else each for name, each in found.items()}
        if not all(_describes(slot) for each in layers.values() for slot in each.values()):
            raise self._damaged("quantizers")
        return layers

    @property
    def left_float(self) -> dict[str, str]:
        """The layers that it left float -> why; raises MicronetError if the record is damaged."""
        found: dict[str, str] = self._typed("left_float", dict[str, str])
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)

    def _typed(self, name: str, kind: Any) -> Any:
        value = self.result.get(name, {})
        if not accepts(kind, value):
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> MicronetError:
        return MicronetError(f"the {self.stage} record has corrupted {name}; recreate the file")


@dataclass(frozen=True)
class Header:
    """Everything in an artifact except its tensors."""

    model: dict[str, Any]  # a ModelSpec
    history: list[StageRecord]
    metrics: dict[str, Any] = field(default_factory=dict)  # what was measured before it was written
    data: dict[str, Any] | None = None  # a DataSpec
    seed: int | None = None
    command: str = ""  # the command line that made it, in files of earlier versions
    versions: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a tensor -> the name that its memory is stored under

    def to_json(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Header":
        """Build a header from its JSON object; raise ValueError or MicronetError if it is damaged."""
        if not accepts(list[dict[str, Any]], value.get("history")):
            raise ValueError("its history is not a list of records")
        known = {key: item for key, item in value.items() if key in cls.__dataclass_fields__}
        history = [make_record(StageRecord, record) for record in known["history"]]
        header = make_record(cls, {**known, "history": history})
        ModelSpec.from_json(header.model)
        DataSpec.from_json(header.data)
        return header


def _describes(slot: Any) -> bool:
    """Return True if a value describes a quantizer, as far as reports read it."""
    return isinstance(slot, dict) and isinstance(slot.get("scheme"), str)


def read_header(path: Path) -> tuple[Header, Table]:
    """Return an artifact's header, and the table of its tensors.

    Raises:
        MicronetError: The file is damaged or not an artifact; the message says what it seems to be.
    """
    table = open_table(path)
    if KEY not in table.metadata:
        raise MicronetError(
            f"{path} is a safetensors file that micronet did not write; import it with: "
            f"micronet import --model NAME --weights {path}"
        )
    try:
        value = table.header(KEY)
        version = value.get("format")
        if type(version) is int and version > FORMAT:
            raise MicronetError(
                f"{path} has format {version}, but this version of micronet only reads formats up to {FORMAT}; "
                "upgrade with pip install -U micronet-compress"
            )
        if version != FORMAT:
            raise ValueError(f"its format is {version!r:.40}")
        return Header.from_json(value), table
    except ValueError as error:
        raise MicronetError(f"{path} has a corrupted micronet header ({error}); recreate it") from error


def open_table(path: Path) -> Table:
    """Read a tensor file's table; raise MicronetError that says what the file seems to be if it is none."""
    if path.is_dir():
        raise MicronetError(f"{path} is a folder; expected an artifact (.safetensors)")
    if not path.exists():
        raise MicronetError(f"{path} does not exist; create it with micronet train or micronet import")
    try:
        return read_table(path)
    except OSError as error:
        raise MicronetError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MicronetError(f"{path} is {_guess(path, error)}, not an artifact (.safetensors)") from error


def _guess(path: Path, error: ValueError) -> str:
    """Guess from its first bytes what a file is that cannot be read as an artifact."""
    if not path.is_file():
        return "a pipe or a device"
    with path.open("rb") as file:
        start = file.read(8)
    if start.endswith(bytes(4)):  # the length of a header, which may begin as other kinds of files do
        return f"a truncated or corrupted file ({error})"
    known = [kind.format(path=path) for signature, kind in _SIGNATURES.items() if start.startswith(signature)]
    if known:
        return known[0]
    return f"a truncated, corrupted or unrecognized file ({error})" if start else "an empty file"
