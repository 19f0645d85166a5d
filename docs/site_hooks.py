"""What mkdocs does beside its plugins: pages from files outside docs/, and formulas.

On GitHub a page links to `../CONTRIBUTING.md`, and the README to `docs/mathematics.md`. The site
takes such files as pages of its own and turns the links; links to other files of the repository
become plain code. LaTeX becomes MathML, which browsers typeset without scripts or fonts from
elsewhere.
"""

from __future__ import annotations

import html
import posixpath
import re
import unicodedata
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/ptx_emulator/README.md": "ptx_emulator.md",
    "tests/software_cuda/README.md": "software_cuda.md",
}
SOURCES = {page: source for source, page in PAGES.items()}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_SCRIPT = re.compile(r'<mi mathvariant="script">([A-Z])</mi>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def turned(link: re.Match) -> str:
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return f"`{text}`" if (ROOT / path).exists() else link[0]  # mkdocs says what is wrong
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(here))}{anchor or ''})"

    return _LINK.sub(turned, markdown)


def on_page_content(content: str, page, config: MkDocsConfig, files: Files) -> str:
    def typeset(formula: re.Match) -> str:
        display = "block" if formula[2] == "[" else "inline"
        return _SCRIPT.sub(_letter, convert(html.unescape(formula[3]).strip(), display=display))

    return _MATH.sub(typeset, content)


def _letter(script: re.Match) -> str:
    """A calligraphic letter by its own code point, as browsers have dropped the attribute."""
    return f"<mi>{unicodedata.lookup(f'MATHEMATICAL SCRIPT CAPITAL {script[1]}')}</mi>"
