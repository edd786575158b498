"""What mkdocs does besides: the pages that lie beside docs/ are part of the site, and links to them lead there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("BENCHMARKS.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages beside docs/."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the pages of the site, and those to the README to its first page."""
    if page.file.src_uri in PAGES:  # they link to docs/NAME.md
        return text.replace("](docs/", "](").replace("](README.md", "](index.md")
    text = re.sub(rf"\]\(\.\./({'|'.join(PAGES)})", r"](\1", text)
    return text.replace("](../README.md", "](index.md")
