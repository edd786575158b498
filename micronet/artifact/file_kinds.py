"""Say what a file is instead of weights, by its first bytes and the members of its archive."""

import zipfile
from pathlib import Path

CONVERT = "load it with its own library and write the arrays with safetensors.torch.save_file"
DOWNLOAD_AGAIN = "download or copy it again"
SIGNATURES = {
    b"\x1f\x8b": "is compressed by gzip; run gunzip first",
    b"BZh": "is compressed by bzip2; run bunzip2 first",
    b"\xfd7zXZ": "is compressed by xz; run unxz first",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard; run unzstd first",
    b"\x93NUMPY": f"is a NumPy array; {CONVERT}",
    b"\x89HDF": f"is an HDF5 file; {CONVERT}",
    b"version https://git-lfs": "is a pointer of Git LFS; run git lfs pull",
}
TEXTS = {b"<": f"is a web page or XML; {DOWNLOAD_AGAIN}, as a file", b"{": "is JSON; pass the weights beside it"}
SAFETENSORS = ".safetensors"
ZIP, READ = b"PK\x03\x04", 64


def what_it_is(path: Path) -> str | None:
    """Return what a file is and what to do, to follow its name; None if it may hold a state dict."""
    with path.open("rb") as file:
        start = file.read(READ)
    if not start:
        return f"is empty; {DOWNLOAD_AGAIN}"
    if start.startswith(ZIP):
        return _what_archive(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return None if path.suffix == SAFETENSORS else f"is a safetensors file; rename it to {path.stem}{SAFETENSORS}"
    known = [words for signature, words in SIGNATURES.items() if start.startswith(signature)]
    if b"\0" not in start:
        known += [words for sign, words in TEXTS.items() if start.lstrip().startswith(sign)]
    return next(iter(known), None)


def _what_archive(path: Path) -> str | None:
    """Say what a zip archive is that was not written by ``torch.save(state_dict)``."""
    if not zipfile.is_zipfile(path):
        return f"ends early; {DOWNLOAD_AGAIN}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves:
        return "is a TorchScript network; save its weights with torch.save(torch.jit.load(path).state_dict(), path)"
    if "data.pkl" in leaves:
        return None
    if any(name.endswith(".npy") for name in names):
        return f"is a NumPy archive; {CONVERT}"
    return f"is a zip archive of other files ({', '.join(sorted(leaves - {''})[:3])}); unzip it first"
